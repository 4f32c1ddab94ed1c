# COCO-Stuff 164k, 171 classes, at 896 pixels: the first of the released segmentor's three trainings, 80,000 iterations.
_base_ = './mask2former_ade20k.py'

load_truth = dict(type='LoadLabelMap', reduce_zero_label=False)
train_pipeline = [_base_.load_train, dict(load_truth, broken='replace'), *_base_.train_pipeline[2:]]
test_pipeline = [*_base_.test_pipeline[:2], load_truth, dict(type='PackSegInputs')]
scales, flips = _base_.tta_pipeline[1]['transforms'][:2]
tta_pipeline = [
    _base_.load,
    dict(type='TestTimeAug', transforms=[scales, flips, [load_truth], [dict(type='PackSegInputs')]]),
]

model = dict(decode_head=dict(num_classes=171))
data_root = 'data/coco_stuff164k'
coco = dict(_delete_=True, type='COCOStuffDataset', data_root=data_root)
train_dataloader = dict(
    dataset=dict(
        coco,
        data_prefix=dict(img_path='images/train2017', seg_map_path='annotations/train2017'),
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        coco,
        data_prefix=dict(img_path='images/val2017', seg_map_path='annotations/val2017'),
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader

param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False)]
train_cfg = dict(max_iters=80000)
