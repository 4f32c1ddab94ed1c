# The same with a Gram teacher:
#   bash tools/dist_train.sh configs/dinov3/continue_gram_vits16plus.py GPUS --data DIR --weights FILE
_base_ = ['../_base_/continue_gram.py']

model = dict(backbone=dict(arch='small_plus'))
