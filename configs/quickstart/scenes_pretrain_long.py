# The same as scenes_pretrain.py for longer: 288,000 images drawn from 20,000 scenes.
_base_ = ['./scenes_pretrain.py']

max_iters = 4500
train_cfg = dict(max_iters=max_iters)
train_dataloader = dict(source=dict(length=20000))

custom_hooks = _base_.custom_hooks
custom_hooks[0]['lr']['warmup_iters'] = 200
custom_hooks[1]['momentum']['base'] = 0.985
custom_hooks[1]['teacher_temp']['total_iters'] = 2000
custom_hooks[-1]['interval'] = 500
