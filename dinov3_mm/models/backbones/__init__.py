"""Backbones, registered in MMEngine's root registry."""

from .convnext import DINOv3ConvNeXt
from .dinov2_vit import DINOv2ViT
from .outputs import TokenOutput
from .timm_backbone import FeatureMapBackbone, TimmBackbone
from .vit import DINOv3ViT
from .zoo import CONVNEXT_ARCHITECTURES, DINOV2_ARCHITECTURES, VIT_ARCHITECTURES, ZOO, ZooRow

__all__ = [
    "CONVNEXT_ARCHITECTURES",
    "DINOV2_ARCHITECTURES",
    "VIT_ARCHITECTURES",
    "ZOO",
    "DINOv2ViT",
    "DINOv3ConvNeXt",
    "DINOv3ViT",
    "FeatureMapBackbone",
    "TimmBackbone",
    "TokenOutput",
    "ZooRow",
]
