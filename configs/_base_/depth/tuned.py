# The whole backbone trains, lower layers more slowly; a leaf names these three.
_base_ = ['../tuning/layer_decay.py']

tuned_param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=1500),
    dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=1500),
]
