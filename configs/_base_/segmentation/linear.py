# Batch normalisation and a 1x1 convolution on the patches of the last layer, with the final norm. The loss is averaged
# over all pixels, those to ignore included. Windows of 512 every 341 pixels; --cfg-options model.test_cfg.mode=whole
# predicts images in one piece. A leaf gives backbone, statistics, size_divisor = stride and decode_head.in_channels.
model = dict(
    type='DINOv3PaddedEncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        bgr_to_rgb=True,
        size=(512, 512),
        pad_val=0,
        seg_pad_val=255,
    ),
    decode_head=dict(
        type='DINOv3LinearSegHead',
        dropout_ratio=0.1,
        loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=False),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)
