_base_ = ['../_base_/backbones/vits16.py', '../_base_/depth/linear_kitti.py']

model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=_base_.backbone,
    decode_head=dict(in_channels=_base_.embed_dims),
)
