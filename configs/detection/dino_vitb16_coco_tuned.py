# The whole backbone trains, with layer decay and drop path of ViTDet (arXiv 2203.16527).
_base_ = ['./dino_vitb16_coco.py', '../_base_/tuning/layer_decay.py']

model = dict(backbone=_base_.tuned_backbone)
optim_wrapper = dict(
    _base_.tuned_optim_wrapper,
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=1e-4, betas=(0.9, 0.999)),
    paramwise_cfg=dict(layerwise_decay=0.7),
    clip_grad=dict(max_norm=0.1),
)
