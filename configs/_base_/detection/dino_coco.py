# mmdet's DINO (arXiv 2203.03605) on COCO as published, over a simple feature pyramid. A config adds the backbone, its
# width and its stride.
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'

model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(_delete_=True),
    neck=dict(_delete_=True, type='SimpleFeaturePyramid', out_channels=256, strides=(8, 16, 32, 64)),
)
# Files are read as everywhere in this project; in training one that cannot be read is counted and replaced.
load = dict(type='LoadMissingImage', backend_args=_base_.backend_args)
train_pipeline = [dict(load, broken='replace'), *_base_.train_pipeline[1:]]
test_pipeline = [load, *_base_.test_pipeline[1:]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='LayerDecayOptimConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=1e-4),
    clip_grad=dict(max_norm=0.1),
)

param_scheduler = [dict(type='MultiStepShareLR', by_epoch=True, shares=[11 / 12], gamma=0.1)]

custom_imports = dict(imports=['dinov3_mm', 'dinov3_mm.models.detection'])
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1, save_best='coco/bbox_mAP', rule='greater'))
custom_hooks = [dict(type='FrozenBackboneHook'), dict(type='NumClassCheckHook')]
# On a GPU products are in bf16 (autocast); losses, matching and linear probes stay in fp32. 'fp32' switches it off.
compute_dtype = 'auto'
randomness = dict(seed=0)
