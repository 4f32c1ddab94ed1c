_base_ = ['./linear.py', './folder.py', './schedule_linear.py', './runtime.py']
