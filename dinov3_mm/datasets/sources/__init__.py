"""Where images come from."""

from dinov3_mm.datasets.image_files import IMAGE_EXTENSIONS
from dinov3_mm.datasets.images import BrokenImageError, ImageHeader, read_image
from dinov3_mm.datasets.multiband import PixelFormat
from dinov3_mm.datasets.sources.mixture import BatchMixture, WeightedConcat

from .files import FileSource, ImageFolder, ImageList, ImageSource, ReadableSubset
from .mixture import MMDatasetSource

__all__ = [
    "IMAGE_EXTENSIONS",
    "BatchMixture",
    "BrokenImageError",
    "FileSource",
    "ImageFolder",
    "ImageHeader",
    "ImageList",
    "ImageSource",
    "MMDatasetSource",
    "PixelFormat",
    "ReadableSubset",
    "WeightedConcat",
    "read_image",
]
