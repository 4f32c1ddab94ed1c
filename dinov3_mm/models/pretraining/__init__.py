"""Self-supervised pretraining: the DINOv3 algorithm, heads, Gram teacher and diagnostics."""

from .dinov3 import DINOv3
from .gram_teacher import GramTeacher
from .head import DINOHead
from .preprocessor import MultiCropPreprocessor

__all__ = ["DINOHead", "DINOv3", "GramTeacher", "MultiCropPreprocessor"]
