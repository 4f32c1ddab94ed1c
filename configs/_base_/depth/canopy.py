# Canopy height of satellite or aerial images, 0 to 96 m: the released head (CHMv2). Heights in metres, TIFF of floating
# point or .npy, 0 for bare ground, NaN or negative where nothing was measured. How it was trained is not published.
_base_ = ['./dpt_folder.py']

model = dict(
    # Red has another mean than the satellite backbone's own statistics: 0.420, not 0.430.
    data_preprocessor=dict(
        mean=[107.1, 104.805, 75.48],
        std=[54.315, 39.78, 36.465],
        seg_pad_val=-1,
    ),
    decode_head=dict(
        channels=256,
        post_process_channels=[128, 256, 512, 1024],
        hidden_channels=128,
        readout='project',
        use_batchnorm=False,
        use_bias=True,
        projection_after_fusion=False,
        max_depth=96.0,
        bins='mixlog',
        norm='mixlog',
        zero_is_valid=True,
        loss_decode=dict(_delete_=True, type='DINOv3SigLoss', warm_up=100),
    ),
    test_cfg=dict(flip=False),
)

train_pipeline = [
    dict(type='LoadMissingImage', to_float32=True, broken='replace'),
    dict(type='LoadDepthMap', nodata_depth=-1, broken='replace'),
    dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
    dict(type='RandomCrop', crop_size=(448, 448)),
    dict(type='RandomGammaBrightness', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadMissingImage', to_float32=True),
    dict(type='LoadDepthMap', nodata_depth=-1),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(dataset=dict(data_root='data/canopy', depth_scale=1.0, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root='data/canopy', depth_scale=1.0, pipeline=test_pipeline))
test_dataloader = val_dataloader
# The published R^2 is of blocks whose size is not known to us.
val_evaluator = dict(_delete_=True, type='DINOv3CanopyMetric', block_size=50, max_height=96.0)
test_evaluator = val_evaluator
