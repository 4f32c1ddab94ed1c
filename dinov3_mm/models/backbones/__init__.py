"""Backbones, registered in MMEngine's root registry."""

from .variants import ARCHITECTURES, ZOO, ReleasedBackbone
from .vit import DINOv3ViT, TokenOutput

__all__ = ["ARCHITECTURES", "ZOO", "DINOv3ViT", "ReleasedBackbone", "TokenOutput"]
