"""Mask2Former on DINOv3: adapter, head and segmentor; needs mmseg, mmdet and mmcv's operators.

A config lists this module in ``custom_imports``.
"""

from dinov3_mm.hosts import require_host

require_host("mmseg")
require_host("mmdet")

from dinov3_mm.models.adapters.vit_adapter import DINOv3ViTAdapter  # noqa: E402

from .mask2former_head import DINOv3Mask2FormerHead, semantic_map  # noqa: E402
from .mask2former_segmentor import DINOv3PaddedEncoderDecoder  # noqa: E402

__all__ = [
    "DINOv3Mask2FormerHead",
    "DINOv3PaddedEncoderDecoder",
    "DINOv3ViTAdapter",
    "semantic_map",
]
