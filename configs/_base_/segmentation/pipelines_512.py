# Images of short side 512, scaled by 0.5 to 2 in training, crops of 512: the linear protocol on ADE20K. Resized by PIL,
# which filters when it shrinks. The long side is not bounded. Label 0 is removed where a data set says so
# (reduce_zero_label). Crops are drawn again, up to ten times, if one class covers three quarters.
long_side = 1000000
load = dict(type='LoadMissingImage')
load_labels = dict(type='LoadLabelMap')
# In training a file that cannot be read is counted and replaced.
load_train = dict(load, broken='replace')
load_labels_train = dict(load_labels, broken='replace')
train_pipeline = [
    load_train,
    load_labels_train,
    dict(
        type='RandomResize',
        scale=(long_side, 512),
        ratio_range=(0.5, 2.0),
        keep_ratio=True,
        backend='pillow',
    ),
    dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='DINOv3PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
# The label is read after the resize: predictions are brought to its size.
test_pipeline = [
    load,
    dict(type='Resize', scale=(long_side, 512), keep_ratio=True, backend='pillow'),
    load_labels,
    dict(type='PackSegInputs'),
]
# tools/test.py CONFIG CHECKPOINT --tta: six scales, each also flipped; probabilities are averaged.
tta_model = dict(type='SegTTAModel')
tta_pipeline = [
    load,
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=(long_side, side), keep_ratio=True, backend='pillow')
                for side in (256, 384, 512, 640, 768, 896)
            ],
            [
                dict(type='RandomFlip', prob=0.0, direction='horizontal'),
                dict(type='RandomFlip', prob=1.0, direction='horizontal'),
            ],
            [load_labels],
            [dict(type='PackSegInputs')],
        ],
    ),
]
