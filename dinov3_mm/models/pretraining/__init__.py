"""Self-supervised pretraining: the DINOv3 algorithm, heads, Gram teacher and diagnostics."""

from .dinov3 import DINOv3
from .gram_teacher import GramTeacher
from .head import DINOv3Head
from .preprocessor import MultiCropPreprocessor

__all__ = ["DINOv3", "DINOv3Head", "GramTeacher", "MultiCropPreprocessor"]
