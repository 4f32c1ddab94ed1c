_base_ = ['./linear.py', './imagenet_224.py', './schedule_linear.py', './runtime.py']

default_hooks = dict(checkpoint=dict(by_epoch=False, interval=1250))
