# The widths of the released segmentor; its first training.
_base_ = ['../_base_/backbones/vit7b16.py', '../_base_/segmentation/mask2former_coco-stuff.py']

model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=dict(
        type='DINOv3ViTAdapter',
        backbone=_base_.backbone,
        interaction_indexes=_base_.four_layers,
        backbone_autocast=True,
    ),
    decode_head=dict(_base_.wide, in_channels=_base_.four_dims),
)
