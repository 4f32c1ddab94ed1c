_base_ = ['./linear.py', './nyu.py', './schedule_linear.py', './runtime.py']
