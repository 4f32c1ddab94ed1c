_base_ = ['../_base_/backbones/vitl16.py', '../_base_/segmentation/linear_folder.py']

# The lines of classes.txt; --cfg-options model.decode_head.num_classes=N.
model = dict(
    size_divisor=_base_.stride,
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=_base_.backbone,
    decode_head=dict(in_channels=_base_.embed_dims, num_classes=2),
)
