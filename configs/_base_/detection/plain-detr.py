# The released detector (paper, section 6.3.1). A config adds the backbone, its layers and its width. Two views of four
# layers are concatenated: in_channels is 8 times the width of the backbone.
model = dict(
    type='DINOv3PlainDETR',
    data_preprocessor=dict(type='DetDataPreprocessor', bgr_to_rgb=True, pad_size_divisor=16),
    backbone=dict(type='DINOv3WindowedBackbone', num_windows=2),
    bbox_head=dict(type='DINOv3PlainDETRHead', num_classes=80, with_cp=True),
    test_cfg=dict(max_per_img=1500),
)
tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.7), max_per_img=300))
