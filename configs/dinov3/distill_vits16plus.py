# Distil a ViT-7B into ViT-S+/16 (SwiGLU of ratio 6):
#   bash tools/dist_train.sh configs/dinov3/distill_vits16plus.py GPUS --data DIR --teacher FILE
# The released trainer ignores student.ffn_ratio and so cannot build this student.
_base_ = ['../_base_/distill_vit.py']

model = dict(backbone=dict(arch='small_plus'))
