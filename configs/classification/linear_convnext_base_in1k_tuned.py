_base_ = ['../_base_/backbones/convnext_base.py', '../_base_/classification/tuned_in1k.py']

model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=dict(_base_.backbone, **_base_.tuned_backbone),
    head=dict(in_channels=2 * _base_.embed_dims),
)
