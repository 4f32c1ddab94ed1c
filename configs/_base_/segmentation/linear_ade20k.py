_base_ = ['./linear.py', './ade20k_512.py', './schedule_linear.py', './runtime.py']

model = dict(decode_head=dict(num_classes=150))
