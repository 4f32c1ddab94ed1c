# Continue DINOv3 ViT-S/16 on your images:
#   bash tools/dist_train.sh configs/dinov3/continue_vits16.py GPUS --data DIR --weights FILE
_base_ = ['../_base_/continue.py']

model = dict(backbone=dict(arch='small'))
