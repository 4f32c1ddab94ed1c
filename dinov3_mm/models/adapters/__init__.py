"""What turns the maps of a plain ViT into multi-scale features; MMEngine and torch only."""

from .simple_feature_pyramid import SimpleFeaturePyramid

__all__ = ["SimpleFeaturePyramid"]
