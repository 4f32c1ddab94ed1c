# Cityscapes: crops of 512 x 1024, whole images in evaluation, 90,000 iterations of 16 images, as in mmseg.
_base_ = './mask2former_ade20k.py'

crop_size = (512, 1024)
model = dict(
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(num_classes=19),
    test_cfg=dict(_delete_=True, mode='whole'),
)
load_truth = dict(type='LoadLabelMap', reduce_zero_label=False)
train_pipeline = [
    _base_.load_train,
    dict(load_truth, broken='replace'),
    dict(
        type='RandomChoiceResize',
        scales=[int(1024 * x * 0.1) for x in range(5, 21)],
        resize_type='ResizeShortestEdge',
        max_size=4096,
    ),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    *_base_.train_pipeline[4:],
]
test_pipeline = [_base_.load, load_truth, dict(type='PackSegInputs')]
tta_pipeline = [
    _base_.load,
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(_base_.resize, scale=(100000, side)) for side in (928, 992, 1024, 1075, 1126)],
            _base_.tta_pipeline[1]['transforms'][1],
            [load_truth],
            [dict(type='PackSegInputs')],
        ],
    ),
]

data_root = 'data/cityscapes/'
cityscapes = dict(_delete_=True, type='CityscapesDataset', data_root=data_root)
train_dataloader = dict(
    dataset=dict(
        cityscapes,
        data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'),
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        cityscapes,
        data_prefix=dict(img_path='leftImg8bit/val', seg_map_path='gtFine/val'),
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader

param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False)]
train_cfg = dict(max_iters=90000)
