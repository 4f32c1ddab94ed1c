_base_ = ['./linear_convnext_tiny_folder.py', '../_base_/tuning/layer_decay.py']

model = dict(backbone=_base_.tuned_backbone)
optim_wrapper = _base_.tuned_optim_wrapper
