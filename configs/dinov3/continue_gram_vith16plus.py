# The same with a Gram teacher:
#   bash tools/dist_train.sh configs/dinov3/continue_gram_vith16plus.py GPUS --data DIR --weights FILE
_base_ = ['../_base_/continue_gram.py']

# Activations are recomputed in the backward pass: 840 M parameters leave little memory.
model = dict(backbone=dict(arch='huge_plus', with_cp=True))

# 32 layers: 0.9 would leave the first ones 3 % of the rate.
optim_wrapper = dict(paramwise_cfg=dict(layerwise_decay=0.95))
