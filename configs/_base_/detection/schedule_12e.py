# 12 epochs of batches of 16. Frozen tensors are in no parameter group; norms and biases do not decay.
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='LayerDecayOptimConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05, betas=(0.9, 0.999)),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepShareLR', by_epoch=True, shares=[9 / 12, 11 / 12], gamma=0.1),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(enable=False, base_batch_size=16)
