"""What a script or a notebook calls."""

from dinov3_mm.features import FeatureSet, load_features

from .extraction import extract_to_files
from .extractor import FeatureExtractor
from .preparation import ImagePreparation, UnsuitableImageError
from .tokens import ImageFeatures, Tokens

__all__ = [
    "FeatureExtractor",
    "FeatureSet",
    "ImageFeatures",
    "ImagePreparation",
    "Tokens",
    "UnsuitableImageError",
    "extract_to_files",
    "load_features",
]
