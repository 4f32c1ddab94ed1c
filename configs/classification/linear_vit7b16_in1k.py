# The released classifier. Evaluate it, or train another one from it:
#
#     python tools/test.py configs/classification/linear_vit7b16_in1k.py --weights BACKBONE --head HEAD --data IMAGENET
_base_ = ['../_base_/backbones/vit7b16.py', '../_base_/classification/linear_in1k.py']

model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=_base_.backbone,
    head=dict(
        in_channels=2 * _base_.embed_dims,
        init_cfg=dict(
            type='DINOv3HeadPretrained',
            kind='linear_classifier',
            checkpoint='dinov3_vit7b16_imagenet1k_linear_head-90d8ed92.pth',
        ),
    ),
)
