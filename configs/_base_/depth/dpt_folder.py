_base_ = ['./dpt.py', './folder.py', './schedule_dpt.py', './runtime.py']
