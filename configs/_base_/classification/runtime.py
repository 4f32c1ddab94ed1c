# What every classifier shares: imports, logs, checkpoints of the head with a record of the frozen backbone.
default_scope = 'mmpretrain'
custom_imports = dict(imports=['dinov3_mm', 'dinov3_mm.models.classification'])

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1, save_best='accuracy/top1', rule='greater'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='VisualizationHook', enable=False),
)
custom_hooks = [dict(type='FrozenBackboneHook'), dict(type='ClassCheckHook')]

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
# On a GPU products are in bf16 (autocast); losses, matching and linear probes stay in fp32. 'fp32' switches it off.
compute_dtype = 'auto'
randomness = dict(seed=0)
