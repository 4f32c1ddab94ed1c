"""Self-supervised pretraining: the DINOv3 algorithm, its heads, its Gram teacher, its diagnostics."""

from .head import DINOHead

__all__ = ["DINOHead"]
