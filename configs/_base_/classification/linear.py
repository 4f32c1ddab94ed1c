# A linear layer on CLS ++ mean patch of the last block (spatial mean for a ConvNeXt): the released classifier.
# A leaf gives backbone, statistics and head.in_channels = 2 * embed_dims.
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(type='ClsDataPreprocessor', num_classes=1000, to_rgb=True),
    backbone=dict(out_type='featmap+cls'),
    neck=dict(type='DINOv3ClsPatchNeck'),
    head=dict(type='DINOv3LinearClsHead', num_classes=1000),
)
