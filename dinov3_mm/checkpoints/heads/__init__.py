"""Weights of downstream heads: released files, and heads that their official trainers wrote."""

from .initializer import DINOv3HeadPretrained
from .kinds import KINDS, HeadNames, head_names
from .loading import export_head, load_head

__all__ = [
    "KINDS",
    "DINOv3HeadPretrained",
    "HeadNames",
    "export_head",
    "head_names",
    "load_head",
]
