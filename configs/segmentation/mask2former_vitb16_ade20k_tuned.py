# Trains the ViT inside the adapter as well.
_base_ = ['./mask2former_vitb16_ade20k.py', '../_base_/tuning/layer_decay.py']

model = dict(backbone=dict(backbone=_base_.tuned_backbone))
optim_wrapper = _base_.tuned_optim_wrapper
