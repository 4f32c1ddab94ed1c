# The linear protocol: 40,000 iterations of 16 images (8 GPUs of 2), AdamW on all parameters of the head, warm-up and one
# cosine over the whole training, whose first two iterations share a rate. With fewer GPUs raise
# train_dataloader.batch_size.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-3),
)
param_scheduler = [
    dict(type='WarmupOneCycleLR', by_epoch=False, warmup_iters=1500 / 40000, warmup_ratio=1e-6, delay=1),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=40000, val_interval=5000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(enable=False, base_batch_size=16)
