_base_ = ['../_base_/backbones/convnext_small.py', '../_base_/segmentation/mask2former_ade20k.py']

model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=dict(_base_.backbone, out_indices=_base_.four_layers),
    decode_head=dict(in_channels=_base_.four_dims),
)
