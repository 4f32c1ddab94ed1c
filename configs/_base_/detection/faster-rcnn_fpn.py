# The same over the stages of a ConvNeXt. A config adds the backbone and its widths.
_base_ = './faster-rcnn.py'

# Only the last stage has a norm.
model = dict(
    neck=dict(
        _delete_=True, type='FPN', out_channels=256, num_outs=5, norm_cfg=dict(type='GN', num_groups=32)
    ),
)
