# The same as folder_pretrain.py for longer; see scenes_pretrain_long.py.
_base_ = ['./folder_pretrain.py']

max_iters = 4500
train_cfg = dict(max_iters=max_iters)

custom_hooks = _base_.custom_hooks
custom_hooks[0]['lr']['warmup_iters'] = 200
custom_hooks[1]['momentum']['base'] = 0.985
custom_hooks[1]['teacher_temp']['total_iters'] = 2000
custom_hooks[-1]['interval'] = 500
