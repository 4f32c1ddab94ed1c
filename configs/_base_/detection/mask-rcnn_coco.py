_base_ = ['./mask-rcnn.py', './coco_lsj_masks.py', './schedule_12e.py', './runtime.py']
