_base_ = ['./linear.py', './kitti.py', './schedule_linear.py', './runtime.py']

model = dict(decode_head=dict(max_depth=80.0))
