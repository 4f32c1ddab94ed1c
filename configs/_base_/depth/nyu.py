# NYUv2, BTS lists and augmentations: 24,231 images for training, 654 for testing.
train_pipeline = [
    dict(type='LoadMissingImage', to_float32=True, broken='replace'),
    dict(type='LoadDepthMap', broken='replace'),
    dict(type='NYUBorderCrop'),
    dict(type='RandomDepthRotation', prob=0.5, max_angle=2.5),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomCrop', crop_size=(416, 544)),
    dict(type='RandomGammaBrightness', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadMissingImage', to_float32=True),
    dict(type='LoadDepthMap'),
    dict(type='PackSegInputs'),
]

data_root = 'data/nyu'
train_dataloader = dict(
    batch_size=2,
    num_workers=6,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='NYUDepthDataset', data_root=data_root, ann_file='nyu_train.txt', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='NYUDepthDataset',
        data_root=data_root,
        ann_file='nyu_test.txt',
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='DINOv3DepthMetric', min_depth=1e-3, max_depth=10.0, crop='eigen')
test_evaluator = val_evaluator
