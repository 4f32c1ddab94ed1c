# ViT-L/16, stage 2 of 3:
#   bash tools/dist_train.sh configs/dinov3/vitl_gram_anchor.py GPUS --data DIR --from-stage work_dirs/vitl_pretrain
_base_ = ['../_base_/stages_gram_anchor.py', '../_base_/stages_vitl.py']

model = dict(backbone=_base_.backbone_size)

custom_hooks = _base_.custom_hooks
custom_hooks[0]['lr'] = 0.6 * _base_.learning_rate
