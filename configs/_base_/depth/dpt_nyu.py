_base_ = ['./dpt.py', './nyu.py', './schedule_dpt.py', './runtime.py']
