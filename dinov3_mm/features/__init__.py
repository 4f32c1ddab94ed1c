"""Features of frozen backbones: prepared images, one extractor, files on disk."""

from .store import FeatureSet, load_features

__all__ = ["FeatureSet", "load_features"]
