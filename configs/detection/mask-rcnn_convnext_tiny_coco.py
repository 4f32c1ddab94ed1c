_base_ = ['../_base_/backbones/convnext_tiny.py', '../_base_/detection/mask-rcnn_fpn_coco.py']

model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=dict(_base_.backbone, out_indices=(0, 1, 2, 3)),
    neck=dict(in_channels=_base_.four_dims),
)
