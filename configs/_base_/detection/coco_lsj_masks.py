# COCO boxes and masks; see coco_lsj.py.
_base_ = './coco_lsj.py'

train_pipeline = [
    dict(type='LoadMissingImage', broken='replace'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    *_base_.train_pipeline[2:-2],
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1e-2, 1e-2), by_mask=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    *_base_.test_pipeline[:2],
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    _base_.test_pipeline[-1],
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric=['bbox', 'segm'])
test_evaluator = val_evaluator
