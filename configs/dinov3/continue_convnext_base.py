# Continue DINOv3 ConvNeXt-Base on your images:
#   bash tools/dist_train.sh configs/dinov3/continue_convnext_base.py GPUS --data DIR --weights FILE
_base_ = ['../_base_/continue_convnext.py']

model = dict(backbone=dict(arch='base'))
