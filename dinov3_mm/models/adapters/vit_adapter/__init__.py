"""The ViT adapter of Mask2Former on DINOv3; needs mmcv with its operators."""

from dinov3_mm.hosts import require_host

require_host("mmcv.ops")

from .adapter import DINOv3ViTAdapter  # noqa: E402
from .deformable_attention import DeformableAttention  # noqa: E402

__all__ = ["DINOv3ViTAdapter", "DeformableAttention"]
