_base_ = ['./dpt.py', './voc2012_512.py', './schedule_decoder.py', './runtime.py']

model = dict(decode_head=dict(num_classes=21))
