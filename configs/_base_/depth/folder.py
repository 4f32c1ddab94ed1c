# One's own images: <data_root>/{train,val}/images/..., <data_root>/{train,val}/depth/... of the same names, depth in
# millimetres (dataset.depth_scale) as PNG of 16 bits, TIFF or .npy, 0 where nothing was measured.
# tools/train.py --data DIR sets data_root.
train_pipeline = [
    dict(type='LoadMissingImage', to_float32=True, broken='replace'),
    dict(type='LoadDepthMap', broken='replace'),
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

data_root = 'data/depth'
train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='DepthFolderDataset',
        data_root=data_root,
        data_prefix=dict(img_path='train/images', depth_map_path='train/depth'),
        depth_scale=1000.0,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='DepthFolderDataset',
        data_root=data_root,
        data_prefix=dict(img_path='val/images', depth_map_path='val/depth'),
        depth_scale=1000.0,
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='DINOv3DepthMetric', min_depth=1e-3, max_depth=10.0)
test_evaluator = val_evaluator
