# The same over the last three stages of a ConvNeXt. A config adds the backbone and its widths.
_base_ = './dino_coco.py'

model = dict(
    neck=dict(
        _delete_=True,
        type='ChannelMapper',
        kernel_size=1,
        out_channels=256,
        act_cfg=None,
        norm_cfg=dict(type='GN', num_groups=32),
        num_outs=4,
    ),
)
