# A linear depth head on the frozen toy backbone of tools/quickstart.sh: about a minute on one core. Depth in units of
# the rendered world, 1 to 6.
_base_ = [
    '../_base_/backbones/quickstart.py',
    '../_base_/depth/linear.py',
    '../_base_/depth/runtime.py',
]

model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=_base_.backbone,
    decode_head=dict(
        in_channels=_base_.embed_dims,
        num_bins=64,
        min_depth=0.5,
        max_depth=7.0,
        loss_decode=dict(warm_up=20),
    ),
)

# Scenes bring image and depth; image files are loaded and brought to the same size.
test_pipeline = [
    dict(type='LoadMissingImage'),
    dict(type='ResizeImageOnly', size=96),
    dict(type='PackSegInputs'),
]
train_pipeline = [
    dict(type='LoadMissingImage', broken='replace'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
scenes = dict(type='SyntheticScenesTask', task='depth', image_size=96)
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(scenes, length=1000, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(scenes, length=200, start=1000000, pipeline=test_pipeline, test_mode=True),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='DINOv3DepthMetric', scores=['rmse', 'abs_rel', 'a1'], min_depth=0.5, max_depth=7.0)
test_evaluator = val_evaluator

max_iters = 200
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-2, betas=(0.9, 0.99), weight_decay=1e-4),
    clip_grad=dict(max_norm=35.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=50),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(checkpoint=dict(interval=max_iters))
