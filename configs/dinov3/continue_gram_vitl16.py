# The same with a Gram teacher:
#   bash tools/dist_train.sh configs/dinov3/continue_gram_vitl16.py GPUS --data DIR --weights FILE
_base_ = ['../_base_/continue_gram.py']

model = dict(backbone=dict(arch='large'))

# 24 layers: 0.9 would leave the first ones 7 % of the rate.
optim_wrapper = dict(paramwise_cfg=dict(layerwise_decay=0.95))
