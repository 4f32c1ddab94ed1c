"""Segmentation heads on the features of a backbone, as parts of mmseg's segmentors.

Mask2Former, which also needs mmdet, is in ``dinov3_mm.models.segmentation.mask2former``.
"""

from dinov3_mm.hosts import require_host

require_host("mmseg")

from .linear import (  # noqa: E402
    DINOv3DiceLoss,
    DINOv3LinearSegHead,
    DINOv3PaddedEncoderDecoder,
)

__all__ = ["DINOv3DiceLoss", "DINOv3LinearSegHead", "DINOv3PaddedEncoderDecoder"]
