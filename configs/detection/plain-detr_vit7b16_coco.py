# The released detector. Evaluate it, or train another one from it:
#
#     python tools/test.py configs/detection/plain-detr_vit7b16_coco.py --weights BACKBONE --head HEAD --data COCO
_base_ = ['../_base_/backbones/vit7b16.py', '../_base_/detection/plain-detr_coco.py']

model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=dict(backbone=dict(_base_.backbone, out_indices=_base_.four_layers), num_windows=3),
    bbox_head=dict(
        in_channels=8 * _base_.embed_dims,
        category_ids='coco',
        init_cfg=dict(
            type='DINOv3HeadPretrained',
            kind='detector',
            checkpoint='dinov3_vit7b16_coco2017_detr_head-b0235ff7.pth',
        ),
    ),
)
