_base_ = ['./linear_vits16_folder.py']

model = dict(
    backbone=dict(out_type='featmap'),
    neck=None,
    head=dict(_delete_=True, type='DINOv3AttentionHead', num_classes=1000, in_channels=_base_.embed_dims),
)
