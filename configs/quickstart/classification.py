# A linear classifier of twelve categories on the frozen toy backbone of tools/quickstart.sh: about a minute on one core.
_base_ = [
    '../_base_/backbones/quickstart.py',
    '../_base_/classification/linear.py',
    '../_base_/classification/runtime.py',
]

num_classes = 12
model = dict(
    data_preprocessor=dict(num_classes=num_classes, mean=_base_.mean, std=_base_.std),
    backbone=_base_.backbone,
    head=dict(num_classes=num_classes, in_channels=2 * _base_.embed_dims),
)

# Scenes bring their image; image files are loaded and brought to the same size.
test_pipeline = [
    dict(type='LoadMissingImage'),
    dict(type='ResizeEdge', scale=64, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=64),
    dict(type='PackInputs'),
]
train_pipeline = [
    dict(type='LoadMissingImage', broken='replace'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
scenes = dict(type='SyntheticScenesTask', task='classification', image_size=64)
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,  # mmpretrain's own train.py would switch them on
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(scenes, length=2000, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(scenes, length=1000, start=1000000, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy')
test_evaluator = val_evaluator

optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2, weight_decay=1e-4))
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=True, convert_to_iter_based=True)]
train_cfg = dict(by_epoch=True, max_epochs=5, val_interval=5)
val_cfg = dict()
test_cfg = dict()
