# The released segmentor, adapter and head in one file: 62.6 mIoU, 63.0 with --tta (paper, table 11).
# python tools/test.py THIS --weights BACKBONE --head HEAD; training starts from it, 20,000 iterations.
_base_ = ['../_base_/backbones/vit7b16.py', '../_base_/segmentation/mask2former_ade20k.py']

released = 'dinov3_vit7b16_ade20k_m2f_head-bf307cb1.pth'
model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=dict(
        type='DINOv3ViTAdapter',
        backbone=_base_.backbone,
        interaction_indexes=_base_.four_layers,
        backbone_autocast=True,
        init_cfg=dict(type='DINOv3HeadPretrained', kind='mask2former_adapter', checkpoint=released),
    ),
    decode_head=dict(
        _base_.wide,
        in_channels=_base_.four_dims,
        init_cfg=dict(type='DINOv3HeadPretrained', kind='mask2former', checkpoint=released),
    ),
)
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False)]
train_cfg = dict(max_iters=20000)
