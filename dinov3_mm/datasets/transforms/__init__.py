"""Multi-crop augmentation."""

from dinov3_mm.datasets.transforms.multi_crop import PAPER_BLUR, RELEASED_BLUR, MultiCrop

__all__ = ["PAPER_BLUR", "RELEASED_BLUR", "MultiCrop"]
