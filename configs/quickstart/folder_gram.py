# Stage 2 on a folder of images without labels; see scenes_gram.py.
_base_ = ['./scenes_gram.py']

images = dict(type='ImageFolder', root='data/images', decode_min_side=96)
train_dataloader = dict(source=dict(_delete_=True, **images), small_images='upscale')

custom_hooks = [hook for hook in _base_.custom_hooks if hook['type'] != 'DenseProbeHook']
custom_hooks.append(
    dict(
        type='RetrievalEvalHook',
        interval=100,
        source=dict(type='ReadableSubset', source=images),
        image_size=64,
    )
)
