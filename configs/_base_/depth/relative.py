# Relative depth in the manner of Depth Anything V2: losses that scale and shift do not change, on disparity; images and
# depth of any source in folders, evaluated on NYUv2 after alignment. Hyper-parameters of the training are not published.
_base_ = ['./dpt_folder.py']

model = dict(
    decode_head=dict(
        max_depth=100.0,
        loss_decode=[
            dict(type='DINOv3ScaleShiftLoss', space='disparity', align='robust', trim=0.2),
            dict(type='DINOv3GradientMatchingLoss', space='disparity', align='robust', loss_weight=2.0),
        ],
    ),
)

train_pipeline = [
    dict(type='LoadMissingImage', to_float32=True, broken='replace'),
    dict(type='LoadDepthMap', broken='replace'),
    dict(type='Resize', scale=(1024, 768), keep_ratio=False),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadMissingImage', to_float32=True),
    dict(type='LoadDepthMap'),
    dict(type='ResizeImageOnly', size=768),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=2,
    dataset=dict(data_root='data/synthmix', pipeline=train_pipeline),
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='NYUDepthDataset',
        data_root='data/nyu',
        ann_file='nyu_test.txt',
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(crop='eigen', align='least_squares')
test_evaluator = val_evaluator
