# Continue DINOv3 ConvNeXt-Tiny on your images:
#   bash tools/dist_train.sh configs/dinov3/continue_convnext_tiny.py GPUS --data DIR --weights FILE
_base_ = ['../_base_/continue_convnext.py']

model = dict(backbone=dict(arch='tiny'))
