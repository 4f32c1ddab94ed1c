# Distil a ViT-7B into ViT-H+/16 (SwiGLU of ratio 6):
#   bash tools/dist_train.sh configs/dinov3/distill_vith16plus.py GPUS --data DIR --teacher FILE
# Not in the released file of several students; its trainer ignores student.ffn_ratio and cannot build it.
_base_ = ['../_base_/distill_vit.py']

model = dict(backbone=dict(arch='huge_plus'))
