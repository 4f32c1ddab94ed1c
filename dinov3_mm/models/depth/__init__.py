"""Depth estimation on the features of a backbone, in the manner of mmseg."""

from dinov3_mm.hosts import require_host

require_host("mmseg")

from .dpt import DINOv3DPTDepthHead  # noqa: E402
from .estimator import DINOv3DepthEstimator  # noqa: E402
from .heads import DINOv3LinearDepthHead  # noqa: E402
from .losses import (  # noqa: E402  # noqa: E402
    DINOv3DepthGradientLoss,
    DINOv3DepthL1Loss,
    DINOv3GradientMatchingLoss,
    DINOv3ScaleShiftLoss,
    DINOv3SigLoss,
)

__all__ = [
    "DINOv3DPTDepthHead",
    "DINOv3DepthEstimator",
    "DINOv3DepthGradientLoss",
    "DINOv3DepthL1Loss",
    "DINOv3GradientMatchingLoss",
    "DINOv3LinearDepthHead",
    "DINOv3ScaleShiftLoss",
    "DINOv3SigLoss",
]
