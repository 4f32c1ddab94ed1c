# Satellite ViT-7B/16, stage 1 of 3: the hyper-parameters of the web model but for statistics and length (paper section 8.1); no
# configuration of it is released. Taken literally the learning rate rises over the whole run.
_base_ = ['./vit7b_pretrain.py', '../_base_/satellite.py']

max_iters = 100_000
train_cfg = dict(max_iters=max_iters)
model = dict(data_preprocessor=_base_.satellite_statistics)
train_dataloader = dict(source=dict(_delete_=True, **_base_.satellite_images))

# A Gram teacher can be chosen among these.
default_hooks = dict(checkpoint=dict(keep_every=10_000))
