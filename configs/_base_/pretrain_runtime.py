# Everything about a pretraining run that is not the recipe: what is logged, written and kept.
custom_imports = dict(imports=['dinov3_mm'])
runner_type = 'FlexibleRunner'

default_hooks = dict(
    logger=dict(type='ProgressHook', interval=50),
    # Checkpoints for resuming and, beside each, the teacher backbone for users.
    checkpoint=dict(type='PretrainCheckpointHook', interval=1000, max_to_keep=3),
)

# Writers of the metrics. LocalVisBackend: JSON lines in <work_dir>/<time>/vis_data/scalars.json.
# Add dict(type='TensorboardVisBackend') or dict(type='WandbVisBackend') for others.
visualizer = dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')])

randomness = dict(seed=0)
