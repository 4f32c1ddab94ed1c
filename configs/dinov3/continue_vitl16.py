# Continue DINOv3 ViT-L/16 on your images:
#   bash tools/dist_train.sh configs/dinov3/continue_vitl16.py GPUS --data DIR --weights FILE
_base_ = ['../_base_/continue.py']

model = dict(backbone=dict(arch='large'))

# 24 layers: 0.9 would leave the first ones 7 % of the rate.
optim_wrapper = dict(paramwise_cfg=dict(layerwise_decay=0.95))
