_base_ = ['./attention.py', './imagenet_224.py', './schedule_attention.py', './runtime.py']

default_hooks = dict(checkpoint=dict(by_epoch=False, interval=1250))
