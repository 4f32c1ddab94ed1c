# A depth model on frozen features. A leaf gives backbone, statistics and decode_head.in_channels.
model = dict(
    type='DINOv3DepthEstimator',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        bgr_to_rgb=True,
        size_divisor=1,
        pad_val=0,
        # In depth maps 0 means that nothing was measured.
        seg_pad_val=0,
    ),
    backbone=dict(out_type='featmap+cls'),
    test_cfg=dict(flip=True),
)
