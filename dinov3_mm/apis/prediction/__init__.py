"""Predictions of downstream models on images, folders and videos, with overlays."""

from .jobs import (
    Classified,
    DepthEstimated,
    Detected,
    Segmented,
    classify,
    detect,
    estimate_depth,
    segment,
)
from .model import DownstreamModel, load_model

__all__ = [
    "Classified",
    "DepthEstimated",
    "Detected",
    "DownstreamModel",
    "Segmented",
    "classify",
    "detect",
    "estimate_depth",
    "load_model",
    "segment",
]
