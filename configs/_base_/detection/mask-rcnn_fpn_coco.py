_base_ = ['./mask-rcnn_fpn.py', './coco_lsj_masks.py', './schedule_12e.py', './runtime.py']
