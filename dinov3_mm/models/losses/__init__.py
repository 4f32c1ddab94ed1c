"""Losses of DINOv3 pretraining as pure functions: torch only, aware of process groups."""

from .dino import dino_loss
from .fusion import compile_losses
from .gram import gram_loss, resize_tokens
from .ibot import ibot_loss
from .koleo import koleo_loss
from .sinkhorn import sinkhorn_knopp
from .soft_cross_entropy import soft_cross_entropy

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
