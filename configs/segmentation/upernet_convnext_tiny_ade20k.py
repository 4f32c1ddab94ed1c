_base_ = ['../_base_/backbones/convnext_tiny.py', '../_base_/segmentation/upernet_convnext_ade20k.py']

model = dict(
    size_divisor=_base_.stride,
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=dict(_base_.backbone, out_indices=_base_.four_layers),
    decode_head=dict(in_channels=_base_.four_dims),
)
