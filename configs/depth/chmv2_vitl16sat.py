# The released canopy-height model:
#
#     python tools/test.py configs/depth/chmv2_vitl16sat.py --weights BACKBONE --head HEAD --data DIR
_base_ = ['../_base_/backbones/vitl16_sat.py', '../_base_/depth/canopy.py']

model = dict(
    # Blocks 6, 12, 18, 24 counted from 1: not the layers of the other heads of a ViT-L.
    backbone=dict(_base_.backbone, out_indices=[5, 11, 17, 23]),
    decode_head=dict(
        in_channels=_base_.four_dims,
        init_cfg=dict(
            type='DINOv3HeadPretrained',
            kind='dpt_depth',
            checkpoint='dinov3_vitl16_chmv2_dpt_head-3703d643.pth',
        ),
    ),
)
# As the released model, which computes in fp32 throughout.
compute_dtype = 'fp32'
