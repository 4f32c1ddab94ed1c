_base_ = ['./faster-rcnn_fpn.py', './coco_lsj.py', './schedule_12e.py', './runtime.py']
