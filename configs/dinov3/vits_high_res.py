# ViT-S/16, stage 3 of 3:
#   bash tools/dist_train.sh configs/dinov3/vits_high_res.py GPUS --data DIR --from-stage work_dirs/vits_gram_anchor
_base_ = ['../_base_/stages_high_res.py', '../_base_/stages_vits.py']

model = dict(backbone=_base_.backbone_size)

custom_hooks = _base_.custom_hooks
custom_hooks[0]['lr']['end'] = 0.25 * _base_.learning_rate
