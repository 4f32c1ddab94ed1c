# Stage 1 on a folder of images that are not 8-bit RGB: TIFF, .npy or PNG files of any number of channels, 8-bit,
# 16-bit or float. For four bands as below; for others set the three places that are marked with (C).
# tools/compute_statistics.py DIR prints mean and std.
_base_ = ['./scenes_pretrain.py']

images = dict(
    type='ImageFolder',
    root='data/multiband',
    color='unchanged',   # the channels and the precision of the files
    channels=None,       # or the bands to use, counted from 0: (3, 2, 1, 7)
    value_range=None,    # stored values that become 0 and 1; default: 0..255, 0..65535 (16-bit), 0..1 (float)
)
train_dataloader = dict(source=dict(_delete_=True, **images), small_images='upscale')

model = dict(
    # To start from RGB weights, which are adapted by a rule:
    # init_cfg=dict(type='DINOv3Pretrained', checkpoint=FILE, inflate='mean')
    backbone=dict(in_channels=4),          # (C)
    data_preprocessor=dict(
        type='MultiCropPreprocessor',
        mean=[0.45, 0.45, 0.45, 0.45],     # (C)
        std=[0.22, 0.22, 0.22, 0.22],      # (C)
    ),
)

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
