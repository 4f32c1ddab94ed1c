# Distil a ViT-7B into a ConvNeXt-Tiny:
#   bash tools/dist_train.sh configs/dinov3/distill_convnext_tiny.py GPUS --data DIR --teacher FILE
_base_ = ['../_base_/distill_convnext.py']

model = dict(backbone=dict(arch='tiny'))

custom_hooks = _base_.custom_hooks
custom_hooks[0]['lr']['peak'] = 2e-4
