# The linear protocol: SGD without weight decay, 12,500 steps of 1,024 images (10 epochs of 1,250), cosine to 0.
# It trains 13 classifiers at once, with 1e-5 to 0.1 times batch / 256, and keeps the best; this trains one of them.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=1e-2 * 1024 / 256, momentum=0.9, weight_decay=0.0),
)
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=12500, val_interval=1250)
val_cfg = dict()
test_cfg = dict()
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(base_batch_size=1024)
