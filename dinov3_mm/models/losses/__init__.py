"""Losses of DINOv3 pretraining as pure functions: torch only, aware of process groups."""

from .gram import gram_loss, resize_tokens
from .koleo import koleo_loss
from .prototypes import dino_loss, ibot_loss, soft_cross_entropy
from .sinkhorn import compile_losses, sinkhorn_knopp

__all__ = [
    "compile_losses",
    "dino_loss",
    "gram_loss",
    "ibot_loss",
    "koleo_loss",
    "resize_tokens",
    "sinkhorn_knopp",
    "soft_cross_entropy",
]
