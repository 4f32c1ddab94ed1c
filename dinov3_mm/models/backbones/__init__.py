"""Backbones, registered in MMEngine's root registry."""

from .convnext import DINOv3ConvNeXt
from .convnext_variants import CONVNEXT_ARCHITECTURES
from .dinov2_variants import DINOV2_ARCHITECTURES
from .dinov2_vit import DINOv2ViT
from .feature_map import FeatureMapBackbone
from .outputs import TokenOutput
from .timm_backbone import TimmBackbone
from .vit import DINOv3ViT
from .vit_variants import VIT_ARCHITECTURES
from .zoo import ZOO, ZooRow

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
