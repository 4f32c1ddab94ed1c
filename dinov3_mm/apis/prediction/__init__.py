"""Predictions of downstream models on images, folders and videos, with overlays."""

from .jobs import classify, detect, estimate_depth, segment
from .model import DownstreamModel, load_model
from .results import Classified, DepthEstimated, Detected, Segmented

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
