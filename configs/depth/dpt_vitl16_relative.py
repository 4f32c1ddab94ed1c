_base_ = ['../_base_/backbones/vitl16.py', '../_base_/depth/relative.py']

model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=dict(_base_.backbone, out_indices=_base_.four_layers),
    decode_head=dict(in_channels=_base_.four_dims, post_process_channels=_base_.four_dims),
)
