# mmdet's DINO (arXiv 2203.03605) on COCO as published, over a simple feature pyramid. A config adds the backbone, its
# width and its stride.
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'

model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(_delete_=True),
    neck=dict(_delete_=True, type='SimpleFeaturePyramid', out_channels=256, strides=(8, 16, 32, 64)),
)
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
randomness = dict(seed=0)
