# The released relative depth model, evaluated on NYUv2 after alignment:
#
#     python tools/test.py configs/depth/dpt_vit7b16_synthmix.py --weights BACKBONE --head HEAD
_base_ = ['../_base_/backbones/vit7b16.py', '../_base_/depth/relative.py']

model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=dict(_base_.backbone, out_indices=_base_.four_layers),
    decode_head=dict(
        in_channels=_base_.four_dims,
        post_process_channels=[2048] * 4,
        init_cfg=dict(
            type='DINOv3HeadPretrained',
            kind='dpt_depth',
            checkpoint='dinov3_vit7b16_synthmix_dpt_head-02040be1.pth',
        ),
    ),
)
# As the released model, which computes in fp32 throughout.
compute_dtype = 'fp32'
