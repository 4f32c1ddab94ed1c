_base_ = ['./upernet_convnext.py', './ade20k_512.py', './schedule_decoder.py', './runtime.py']

model = dict(decode_head=dict(num_classes=150))
