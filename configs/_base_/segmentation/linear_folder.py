_base_ = ['./linear.py', './folder_512.py', './schedule_linear.py', './runtime.py']

custom_imports = dict(imports=['dinov3_mm', 'dinov3_mm.models.segmentation', 'dinov3_mm.datasets.segmentation'])

# 5,000 iterations: for some thousands of images; more for more.
param_scheduler = [
    dict(type='WarmupOneCycleLR', by_epoch=False, warmup_iters=200 / 5000, warmup_ratio=1e-6, delay=1),
]
train_cfg = dict(max_iters=5000, val_interval=500)
default_hooks = dict(checkpoint=dict(interval=500))
