"""What a script or a notebook calls."""

from dinov3_mm.features import FeatureSet, load_features
from dinov3_mm.features.extraction import extract_to_files
from dinov3_mm.features.extractor import FeatureExtractor
from dinov3_mm.features.preparation import ImagePreparation, UnsuitableImageError
from dinov3_mm.features.tokens import ImageFeatures, Tokens

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
