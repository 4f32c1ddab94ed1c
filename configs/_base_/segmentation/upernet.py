# UPerNet (arXiv 1807.10221) on four layers of a ViT, brought to the strides 4, 8, 16 and 32. A leaf gives backbone,
# statistics and neck.in_channels = four_dims.
model = dict(
    type='DINOv3PaddedEncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        bgr_to_rgb=True,
        size=(512, 512),
        pad_val=0,
        seg_pad_val=255,
    ),
    neck=dict(type='MultiLevelNeck', out_channels=512, scales=[4, 2, 1, 0.5]),
    decode_head=dict(
        type='UPerHead',
        in_channels=[512] * 4,
        in_index=[0, 1, 2, 3],
        channels=512,
        pool_scales=(1, 2, 3, 6),
        dropout_ratio=0.1,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss'),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)
# Statistics of all processes' images.
sync_bn = 'torch'
