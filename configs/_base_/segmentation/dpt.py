# DPT (arXiv 2103.13413) on four layers of a ViT, with CLS read into the patches. A leaf gives backbone, statistics,
# decode_head.embed_dims and decode_head.in_channels = four_dims. mmseg's head needs layers of one width and stride: a
# ConvNeXt takes UPerNet.
model = dict(
    type='DINOv3PaddedEncoderDecoder',
    # The coarsest of its maps has half the resolution of the patches.
    size_divisor=32,
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        bgr_to_rgb=True,
        size=(512, 512),
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(out_type='featmap+cls'),
    decode_head=dict(
        type='DPTHead',
        in_index=[0, 1, 2, 3],
        input_transform='multiple_select',
        channels=256,
        post_process_channels=[96, 192, 384, 768],
        readout_type='project',
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
