_base_ = ['../_base_/backbones/vitl16.py', '../_base_/detection/plain-detr_coco.py']

model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=dict(backbone=dict(_base_.backbone, out_indices=[5, 11, 17, 23])),
    bbox_head=dict(in_channels=8 * _base_.embed_dims),
)
