# COCO at a short side of 2048 px for 12 epochs, as published; the published augmentations and optimiser are unknown.
# The scale jitter and the optimiser are those of DETR and Plain-DETR (arXiv 2308.01904).
_base_ = ['./plain-detr.py', './coco_lsj.py', './schedule_12e.py', './runtime.py']

short_sides = list(range(1536, 2049, 64))
longest = 8192
resize = dict(type='RandomChoiceResize', scales=[(longest, side) for side in short_sides], keep_ratio=True)
train_pipeline = [
    dict(type='LoadMissingImage', broken='replace'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoice',
        transforms=[
            [resize],
            [
                dict(
                    type='RandomChoiceResize',
                    scales=[(longest, side) for side in (1024, 1280, 1536)],
                    keep_ratio=True,
                ),
                dict(
                    type='RandomCrop',
                    crop_type='absolute_range',
                    crop_size=(1024, 1536),
                    allow_negative_crop=True,
                ),
                resize,
            ],
        ],
    ),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=False),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadMissingImage'),
    dict(type='Resize', scale=(longest, 2048), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(dataset=dict(filter_cfg=dict(filter_empty_gt=False), pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# Published: several resolutions from 1536 to 2880; how they are merged is unknown, here by suppression and with flips.
tta_pipeline = [
    dict(type='LoadMissingImage'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(longest, side), keep_ratio=True) for side in (1536, 1984, 2432, 2880)],
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='LoadAnnotations', with_bbox=True)],
            [
                dict(
                    type='PackDetInputs',
                    meta_keys=(
                        'img_id',
                        'img_path',
                        'ori_shape',
                        'img_shape',
                        'scale_factor',
                        'flip',
                        'flip_direction',
                    ),
                )
            ],
        ],
    ),
]

optim_wrapper = dict(
    optimizer=dict(lr=2e-4),
    paramwise_cfg=dict(custom_keys=dict(cpb_mlp=dict(decay_mult=0.0))),
    clip_grad=dict(max_norm=0.1),
)
param_scheduler = [dict(type='MultiStepShareLR', by_epoch=True, shares=[11 / 12], gamma=0.1)]
