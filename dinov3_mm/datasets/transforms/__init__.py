"""Multi-crop augmentation for training, and the transform of an image for inference."""

from dinov3_mm.datasets.transforms.inference import make_transform
from dinov3_mm.datasets.transforms.multi_crop import PAPER_BLUR, RELEASED_BLUR, MultiCrop
from dinov3_mm.datasets.transforms.multi_resolution import MultiResolutionCrop
from dinov3_mm.datasets.transforms.photometric import DINOv3PhotoMetricDistortion

__all__ = [
    "PAPER_BLUR",
    "RELEASED_BLUR",
    "DINOv3PhotoMetricDistortion",
    "MultiCrop",
    "MultiResolutionCrop",
    "make_transform",
]
