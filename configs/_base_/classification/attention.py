# A learned query that attends to the patches of the last block. A leaf gives backbone, statistics and
# head.in_channels = embed_dims. num_layers=4 is the probe of video features.
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(type='ClsDataPreprocessor', num_classes=1000, to_rgb=True),
    backbone=dict(out_type='featmap'),
    head=dict(type='DINOv3AttentionHead', num_classes=1000, num_layers=1),
)
