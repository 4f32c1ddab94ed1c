"""Weights in and out: formats are recognised, converted, loaded strictly, exported."""

from .build import build_backbone, list_backbones
from .export import export_backbone, read_metadata
from .frozen import DINOv3Recorded
from .heads import DINOv3HeadPretrained, export_head, load_head
from .install import DINOv3Pretrained, install_weights, load_backbone_weights
from .io import atomic_write
from .load import ForeignCheckpoint, LoadReport, load_weights
from .locate import Statistics, read_statistics
from .targets import to_hf, to_timm

__all__ = [
    "DINOv3HeadPretrained",
    "DINOv3Pretrained",
    "DINOv3Recorded",
    "ForeignCheckpoint",
    "LoadReport",
    "Statistics",
    "atomic_write",
    "build_backbone",
    "export_backbone",
    "export_head",
    "install_weights",
    "list_backbones",
    "load_backbone_weights",
    "load_head",
    "load_weights",
    "read_metadata",
    "read_statistics",
    "to_hf",
    "to_timm",
]
