# KITTI, Eigen's split: images of the raw recordings, depth maps of the depth benchmark, the lists beside them.
# Crop and augmentations are those of BTS; what the paper used is not published.
train_pipeline = [
    dict(type='LoadMissingImage', to_float32=True, broken='replace'),
    dict(type='LoadDepthMap', broken='replace'),
    dict(type='RandomDepthRotation', prob=0.5, max_angle=1.0),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomCrop', crop_size=(352, 704)),
    dict(type='RandomGammaBrightness', prob=0.5, brightness=(0.9, 1.1)),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadMissingImage', to_float32=True),
    dict(type='LoadDepthMap'),
    dict(type='PackSegInputs'),
]

data_root = 'data/kitti'
folders = dict(img_path='raw', depth_map_path='depth')
train_dataloader = dict(
    batch_size=2,
    num_workers=6,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='KITTIDepthDataset',
        data_root=data_root,
        ann_file='kitti_eigen_train.txt',
        data_prefix=folders,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='KITTIDepthDataset',
        data_root=data_root,
        ann_file='kitti_eigen_test.txt',
        data_prefix=folders,
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='DINOv3DepthMetric', min_depth=1e-3, max_depth=80.0, crop='garg')
test_evaluator = val_evaluator
