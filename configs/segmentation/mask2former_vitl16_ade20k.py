_base_ = ['../_base_/backbones/vitl16.py', '../_base_/segmentation/mask2former_ade20k.py']

model = dict(
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=dict(
        type='DINOv3ViTAdapter',
        backbone=_base_.backbone,
        interaction_indexes=_base_.four_layers,
        num_heads=_base_.embed_dims // 64,
    ),
    decode_head=dict(in_channels=_base_.four_dims),
)
