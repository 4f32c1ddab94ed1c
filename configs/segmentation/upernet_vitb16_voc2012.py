_base_ = ['../_base_/backbones/vitb16.py', '../_base_/segmentation/upernet_voc2012.py']

model = dict(
    size_divisor=_base_.stride,
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=dict(_base_.backbone, out_indices=_base_.four_layers),
    neck=dict(in_channels=_base_.four_dims),
)
