"""Multi-crop augmentation for training, and the transform of an image for inference."""

from dinov3_mm.datasets.transforms.inference import make_transform
from dinov3_mm.datasets.transforms.multi_crop import PAPER_BLUR, RELEASED_BLUR, MultiCrop

from .host_steps import DINOv3PhotoMetricDistortion
from .multi_crop import MultiResolutionCrop

__all__ = [
    "PAPER_BLUR",
    "RELEASED_BLUR",
    "DINOv3PhotoMetricDistortion",
    "MultiCrop",
    "MultiResolutionCrop",
    "make_transform",
]
