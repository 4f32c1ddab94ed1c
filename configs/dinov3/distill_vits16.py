# Distil a ViT-7B into ViT-S/16:
#   bash tools/dist_train.sh configs/dinov3/distill_vits16.py GPUS --data DIR --teacher FILE
_base_ = ['../_base_/distill_vit.py']

model = dict(backbone=dict(arch='small'))
