# As long as the linear protocol; attention needs an adaptive optimizer and a warm-up. No recipe is published.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=3.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=500),
    dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=500),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=12500, val_interval=1250)
val_cfg = dict()
test_cfg = dict()
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(base_batch_size=1024)
