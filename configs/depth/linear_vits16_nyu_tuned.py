_base_ = ['./linear_vits16_nyu.py', '../_base_/depth/tuned.py']

model = dict(backbone=_base_.tuned_backbone)
optim_wrapper = _base_.tuned_optim_wrapper
param_scheduler = _base_.tuned_param_scheduler
