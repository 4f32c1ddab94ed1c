# Your own images and label maps, see SegmentationFolder; tools/train.py --data DIR sets data_root. Images of short side
# 512 as on ADE20K.
_base_ = './pipelines_512.py'

data_root = 'data/folder'
train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='SegmentationFolder', data_root=data_root, split='train', pipeline=_base_.train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='SegmentationFolder', data_root=data_root, split='val', pipeline=_base_.test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU', 'mDice', 'mFscore'])
test_evaluator = val_evaluator
