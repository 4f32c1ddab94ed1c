"""Images with depth maps: data sets and transforms for the pipelines of mmseg."""

from .folder import DepthFolderDataset
from .lists import KITTIDepthDataset, NYUDepthDataset
from .loading import LoadDepthMap
from .transforms import (
    NYUBorderCrop,
    RandomDepthRotation,
    RandomGammaBrightness,
    ResizeImageOnly,
)

__all__ = [
    "DepthFolderDataset",
    "KITTIDepthDataset",
    "LoadDepthMap",
    "NYUBorderCrop",
    "NYUDepthDataset",
    "RandomDepthRotation",
    "RandomGammaBrightness",
    "ResizeImageOnly",
]
