"""Segmentation heads on the features of a backbone, as parts of mmseg's segmentors.

Mask2Former, which also needs mmdet, is in ``dinov3_mm.models.segmentation.mask2former``.
"""

from dinov3_mm.hosts import require_host

require_host("mmseg")

from .dice_loss import DINOv3DiceLoss  # noqa: E402
from .linear_head import DINOv3LinearSegHead  # noqa: E402
from .mask2former_segmentor import DINOv3PaddedEncoderDecoder  # noqa: E402

__all__ = ["DINOv3DiceLoss", "DINOv3LinearSegHead", "DINOv3PaddedEncoderDecoder"]
