# Stage 1 on a folder of images without labels: tools/quickstart.sh DIR sets both roots.
_base_ = ['./scenes_pretrain.py']

images = dict(type='ImageFolder', root='data/images', decode_min_side=96)
train_dataloader = dict(source=dict(_delete_=True, **images), small_images='upscale')

# k-NN needs labels; retrieval of an image from another view of it does not.
custom_hooks = [hook for hook in _base_.custom_hooks if hook['type'] != 'KNNEvalHook']
custom_hooks.append(
    dict(
        type='RetrievalEvalHook',
        interval=200,
        source=dict(type='ReadableSubset', source=images),
        image_size=64,
    )
)
