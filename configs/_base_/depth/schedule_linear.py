# The schedule of the linear probe: 38,400 iterations of 16 images (2 on each of 8 GPUs), a third of them warm-up, in
# which the first beta of AdamW is 0.
max_iters = 38400
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-4, betas=(0.9, 0.99), weight_decay=1e-4),
    clip_grad=dict(max_norm=35.0),
)
param_scheduler = [
    dict(type='WarmupOneCycleLR', by_epoch=False, warmup_iters=1 / 3, final_div_factor=1000.0),
    dict(
        type='WarmupOneCycleMomentum',
        by_epoch=False,
        warmup_iters=1 / 3,
        base_momentum=0.85,
        max_momentum=0.95,
    ),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=1600)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(base_batch_size=16)
