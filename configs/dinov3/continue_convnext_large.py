# Continue DINOv3 ConvNeXt-Large on your images:
#   bash tools/dist_train.sh configs/dinov3/continue_convnext_large.py GPUS --data DIR --weights FILE
_base_ = ['../_base_/continue_convnext.py']

model = dict(backbone=dict(arch='large'))
