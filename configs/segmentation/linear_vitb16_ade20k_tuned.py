_base_ = [
    '../_base_/backbones/vitb16.py',
    '../_base_/segmentation/linear_ade20k.py',
    '../_base_/tuning/layer_decay.py',
]

model = dict(
    size_divisor=_base_.stride,
    data_preprocessor=dict(mean=_base_.mean, std=_base_.std),
    backbone=dict(_base_.backbone, **_base_.tuned_backbone),
    decode_head=dict(in_channels=_base_.embed_dims),
)

optim_wrapper = _base_.tuned_optim_wrapper
