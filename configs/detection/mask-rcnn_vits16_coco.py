_base_ = ['../_base_/backbones/vits16.py', '../_base_/detection/mask-rcnn_coco.py']

model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=_base_.backbone,
    neck=dict(in_channels=_base_.embed_dims, in_stride=_base_.stride),
)
