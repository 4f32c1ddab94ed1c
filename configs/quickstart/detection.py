# Boxes of twelve categories on the frozen toy backbone of tools/quickstart.sh, with mmdet's ATSS over a pyramid of its
# four layers: two to three minutes on one core.
_base_ = [
    '../_base_/backbones/quickstart.py',
    '../_base_/detection/atss.py',
    '../_base_/detection/runtime.py',
]

channels = 96
strides = [8, 16, 32]
model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std, pad_size_divisor=8),
    backbone=dict(_base_.backbone, out_indices=_base_.four_layers),
    neck=dict(
        type='DINOv3ConcatPyramid',
        in_channels=4 * _base_.embed_dims,
        in_stride=_base_.stride,
        out_channels=channels,
        strides=strides,
    ),
    bbox_head=dict(
        num_classes=12,
        in_channels=channels,
        feat_channels=channels,
        stacked_convs=2,
        anchor_generator=dict(strides=strides, octave_base_scale=4),
    ),
    test_cfg=dict(max_per_img=20),
)

# Scenes bring their image; image files are loaded and brought to the same size.
test_pipeline = [
    dict(type='LoadMissingImage'),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'instances'),
    ),
]
train_pipeline = [
    dict(type='LoadMissingImage', broken='replace'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
scenes = dict(type='SyntheticScenesTask', task='detection', image_size=96)
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(scenes, length=8000, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(scenes, length=400, start=1000000, test_mode=True, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', metric='bbox')
test_evaluator = val_evaluator

max_iters = 500
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='LayerDecayOptimConstructor',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=50, eta_min=0.0),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
log_processor = dict(by_epoch=False)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=max_iters))
