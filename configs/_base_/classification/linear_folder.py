_base_ = ['./linear.py', './folder_224.py', './schedule_folder.py', './runtime.py']
