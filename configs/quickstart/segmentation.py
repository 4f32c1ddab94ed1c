# A linear segmentation head of thirteen classes on the frozen toy backbone of tools/quickstart.sh: about two minutes on
# one core.
_base_ = [
    '../_base_/backbones/quickstart.py',
    '../_base_/segmentation/linear.py',
    '../_base_/segmentation/runtime.py',
]

num_classes = 13
model = dict(
    size_divisor=_base_.stride,
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std, size=(96, 96)),
    backbone=_base_.backbone,
    decode_head=dict(num_classes=num_classes, in_channels=_base_.embed_dims),
    test_cfg=dict(mode='whole'),
)

# Scenes bring their image and their labels; image files are loaded and brought to the same height.
test_pipeline = [
    dict(type='LoadMissingImage'),
    dict(type='Resize', scale=(1000000, 96), keep_ratio=True, backend='pillow'),
    dict(type='PackSegInputs'),
]
train_pipeline = [
    dict(type='LoadMissingImage', broken='replace'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackSegInputs'),
]
scenes = dict(type='SyntheticScenesTask', task='segmentation', image_size=96)
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(scenes, length=1000, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(scenes, length=200, start=1000000, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2, weight_decay=1e-3))
param_scheduler = [dict(type='WarmupOneCycleLR', by_epoch=False, warmup_iters=20 / 200, warmup_ratio=1e-6, delay=1)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=200, val_interval=200)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(checkpoint=dict(interval=200), logger=dict(interval=20))
