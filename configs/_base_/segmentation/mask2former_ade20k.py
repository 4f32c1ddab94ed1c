# ADE20K at 896 pixels: windows of 896 every 596 on images of short side 896, as for the released segmentor; with
# test-time augmentation five scales and their mirror images. 160,000 iterations of 16 images, as in mmseg.
_base_ = './mask2former.py'

crop_size = (896, 896)
model = dict(
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(num_classes=150),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(596, 596)),
)

# Resized by PIL, antialiased, as in the published evaluation.
load = dict(type='LoadMissingImage')
load_train = dict(load, broken='replace')  # in training a file that cannot be read is counted and replaced
resize = dict(type='Resize', keep_ratio=True, backend='pillow')
load_truth = dict(type='LoadLabelMap', reduce_zero_label=True)
train_pipeline = [
    load_train,
    dict(load_truth, broken='replace'),
    dict(
        type='RandomChoiceResize',
        scales=[int(896 * x * 0.1) for x in range(5, 21)],
        resize_type='ResizeShortestEdge',
        max_size=3584,
    ),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
# A scale is (largest long side, short side). The truth is not resized.
test_pipeline = [load, dict(resize, scale=(100000, 896)), load_truth, dict(type='PackSegInputs')]
# 0.9, 0.95, 1, 1.05 and 1.1 times 896; those below 896 rounded up to multiples of 32.
tta_pipeline = [
    load,
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(resize, scale=(100000, side)) for side in (832, 864, 896, 940, 985)],
            [
                dict(type='RandomFlip', prob=0.0, direction='horizontal'),
                dict(type='RandomFlip', prob=1.0, direction='horizontal'),
            ],
            [load_truth],
            [dict(type='PackSegInputs')],
        ],
    ),
]

data_root = 'data/ade/ADEChallengeData2016'
train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='ADE20KDataset',
        data_root=data_root,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='ADE20KDataset',
        data_root=data_root,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=5000)
