_base_ = ['./linear.py', './loveda_1024.py', './schedule_linear.py', './runtime.py']

model = dict(decode_head=dict(num_classes=7))
