# Distil a ViT-7B into a ConvNeXt-Large:
#   bash tools/dist_train.sh configs/dinov3/distill_convnext_large.py GPUS --data DIR --teacher FILE
# On 128 GPUs a step takes 109 GiB of each, with model.backbone.with_cp=True 17 GiB.
_base_ = ['../_base_/distill_convnext.py']

model = dict(backbone=dict(arch='large'))

custom_hooks = _base_.custom_hooks
custom_hooks[0]['lr']['peak'] = 1e-4
