_base_ = ['./upernet.py', './cityscapes_1024.py', './schedule_decoder.py', './runtime.py']

model = dict(decode_head=dict(num_classes=19))
