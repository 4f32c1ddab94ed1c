# What every depth config shares: imports, logs, checkpoints of the head with a record of the frozen backbone.
default_scope = 'mmseg'
custom_imports = dict(
    imports=[
        'dinov3_mm',
        'dinov3_mm.models.depth',
        'dinov3_mm.datasets.depth',
        'dinov3_mm.evaluation.depth_metric',
    ]
)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1600, max_keep_ckpts=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
custom_hooks = [dict(type='FrozenBackboneHook'), dict(type='DepthCheckHook')]

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
log_processor = dict(by_epoch=False)
# On a GPU products are in bf16 (autocast); losses, matching and linear probes stay in fp32. 'fp32' switches it off.
compute_dtype = 'auto'
randomness = dict(seed=321)
# Batch norm over the images of all GPUs, as in the official trainer.
sync_bn = 'torch'
