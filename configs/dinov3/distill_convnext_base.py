# Distil a ViT-7B into a ConvNeXt-Base:
#   bash tools/dist_train.sh configs/dinov3/distill_convnext_base.py GPUS --data DIR --teacher FILE
# On 128 GPUs a step takes 74 GiB of each, with model.backbone.with_cp=True 12 GiB.
_base_ = ['../_base_/distill_convnext.py']

model = dict(backbone=dict(arch='base'))

custom_hooks = _base_.custom_hooks
custom_hooks[0]['lr']['peak'] = 1e-4
custom_hooks[0]['weight_decay']['start'] = 0.02  # the other sizes: 0.04
