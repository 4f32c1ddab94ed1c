# ViT-S/16 from scratch, stage 1 of 3:
#   bash tools/dist_train.sh configs/dinov3/vits_pretrain.py GPUS --data DIR
_base_ = ['../_base_/stages_pretrain.py', '../_base_/stages_vits.py']

model = dict(backbone=_base_.backbone_size)

custom_hooks = _base_.custom_hooks
custom_hooks[0]['lr'].update(peak=_base_.learning_rate, end=_base_.learning_rate)
