_base_ = ['../_base_/backbones/vitb16.py', '../_base_/segmentation/dpt_cityscapes.py']

model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=dict(_base_.backbone, out_indices=_base_.four_layers),
    decode_head=dict(embed_dims=_base_.embed_dims, in_channels=_base_.four_dims),
)
