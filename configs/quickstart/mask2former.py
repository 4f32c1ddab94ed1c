# Mask2Former with twelve categories and their surroundings on the frozen toy backbone of tools/quickstart.sh: an
# adapter and narrow decoders, about a minute and a half on one core.
_base_ = ['../_base_/backbones/quickstart.py', '../_base_/segmentation/mask2former.py']

crop_size = (64, 64)
model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std, size=crop_size),
    backbone=dict(
        type='DINOv3ViTAdapter',
        backbone=_base_.backbone,
        interaction_indexes=_base_.four_layers,
        conv_channels=8,
        num_heads=6,
        drop_path_rate=0.0,
    ),
    decode_head=dict(
        in_channels=_base_.four_dims,
        num_classes=13,
        feat_channels=64,
        num_heads=4,
        num_queries=20,
        num_encoder_layers=1,
        num_decoder_layers=3,
        encoder_ffn_channels=128,
        decoder_ffn_channels=128,
        num_points=512,
    ),
)

# Scenes bring their image; image files are loaded and brought to the same short side.
test_pipeline = [
    dict(type='LoadMissingImage'),
    dict(type='Resize', scale=(100000, 64), keep_ratio=True),
    dict(type='PackSegInputs'),
]
train_pipeline = [
    dict(type='LoadMissingImage', broken='replace'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackSegInputs'),
]
scenes = dict(type='SyntheticScenesTask', task='segmentation', image_size=64)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(scenes, length=1000, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(scenes, length=200, start=1000000, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

iterations = 300
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=1.0))
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations)
default_hooks = dict(checkpoint=dict(interval=iterations))
