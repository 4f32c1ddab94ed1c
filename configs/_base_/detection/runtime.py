# What every detector shares: imports, logs, checkpoints of the head with a record of the frozen backbone.
_base_ = 'mmdet::_base_/default_runtime.py'

custom_imports = dict(imports=['dinov3_mm', 'dinov3_mm.models.detection', 'dinov3_mm.datasets.named_coco'])
default_hooks = dict(
    checkpoint=dict(interval=1, max_keep_ckpts=1, save_best='coco/bbox_mAP', rule='greater'),
    visualization=dict(type='DetVisualizationHook', draw=False),
)
custom_hooks = [dict(type='FrozenBackboneHook'), dict(type='NumClassCheckHook')]
# On a GPU products are in bf16 (autocast); losses, matching and linear probes stay in fp32. 'fp32' switches it off.
compute_dtype = 'auto'
randomness = dict(seed=0)
