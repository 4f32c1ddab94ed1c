# As pipelines_512.py, for images whose own short side is 1024 (Cityscapes, LoveDA): crops of 512 from images of short side
# 512 to 2048.
long_side = 1000000
load = dict(type='LoadImageFromFile', imdecode_backend='pillow', color_type='color_ignore_orientation')
train_pipeline = [
    load,
    dict(type='LoadAnnotations'),
    dict(
        type='RandomResize',
        scale=(long_side, 1024),
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
    dict(type='Resize', scale=(long_side, 1024), keep_ratio=True, backend='pillow'),
    dict(type='LoadAnnotations'),
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
                for side in (512, 768, 1024, 1280, 1536, 1792)
            ],
            [
                dict(type='RandomFlip', prob=0.0, direction='horizontal'),
                dict(type='RandomFlip', prob=1.0, direction='horizontal'),
            ],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
