"""Backbones, registered in MMEngine's root registry."""

from .vit import DINOv3ViT, TokenOutput
from .vit_variants import VIT_ARCHITECTURES
from .zoo import ZOO, ZooRow

__all__ = ["VIT_ARCHITECTURES", "ZOO", "DINOv3ViT", "TokenOutput", "ZooRow"]
