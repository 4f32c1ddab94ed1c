_base_ = ['./faster-rcnn.py', './coco_lsj.py', './schedule_12e.py', './runtime.py']
