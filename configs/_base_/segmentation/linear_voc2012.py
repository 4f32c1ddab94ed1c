_base_ = ['./linear.py', './voc2012_512.py', './schedule_linear.py', './runtime.py']

model = dict(decode_head=dict(num_classes=21))
