"""Layers, losses, backbones, and the models of each job in a package of its own.

``pretraining`` and the head packages stand on ``dinov3_mm.checkpoints``, which stands on
``backbones``: they are imported by their own names, not from here.
"""

from dinov3_mm.models.adapters import SimpleFeaturePyramid
from dinov3_mm.models.backbones import DINOv3ConvNeXt, DINOv3ViT

__all__ = ["DINOv3ConvNeXt", "DINOv3ViT", "SimpleFeaturePyramid"]
