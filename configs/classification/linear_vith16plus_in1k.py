_base_ = ['../_base_/backbones/vith16plus.py', '../_base_/classification/linear_in1k.py']

model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=_base_.backbone,
    head=dict(in_channels=2 * _base_.embed_dims),
)
