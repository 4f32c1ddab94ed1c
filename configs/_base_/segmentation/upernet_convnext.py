# UPerNet (arXiv 1807.10221) on the four stages of a ConvNeXt, which have the strides 4, 8, 16 and 32. A leaf gives
# backbone, statistics and decode_head.in_channels = four_dims.
_base_ = './upernet.py'

model = dict(neck=None)
