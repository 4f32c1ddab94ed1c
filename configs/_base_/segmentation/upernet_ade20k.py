_base_ = ['./upernet.py', './ade20k_512.py', './schedule_decoder.py', './runtime.py']

model = dict(decode_head=dict(num_classes=150))
