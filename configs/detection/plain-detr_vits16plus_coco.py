_base_ = ['../_base_/backbones/vits16plus.py', '../_base_/detection/plain-detr_coco.py']

model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=dict(backbone=dict(_base_.backbone, out_indices=_base_.four_layers)),
    bbox_head=dict(in_channels=8 * _base_.embed_dims),
)
