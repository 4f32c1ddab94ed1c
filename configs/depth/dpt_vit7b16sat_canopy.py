# A canopy-height head for the satellite ViT-7B; none was released.
_base_ = ['../_base_/backbones/vit7b16_sat.py', '../_base_/depth/canopy.py']

model = dict(
    backbone=dict(_base_.backbone, out_indices=_base_.four_layers),
    decode_head=dict(in_channels=_base_.four_dims),
)
