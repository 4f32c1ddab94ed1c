"""Where images come from."""

from dinov3_mm.datasets.image_files import IMAGE_EXTENSIONS
from dinov3_mm.datasets.images import BrokenImageError, ImageHeader, read_image
from dinov3_mm.datasets.multiband import PixelFormat
from dinov3_mm.datasets.sources.base import FileSource, ImageSource
from dinov3_mm.datasets.sources.image_folder import ImageFolder
from dinov3_mm.datasets.sources.image_list import ImageList
from dinov3_mm.datasets.sources.mixture import BatchMixture, WeightedConcat
from dinov3_mm.datasets.sources.mm_dataset import MMDatasetSource
from dinov3_mm.datasets.sources.readable_subset import ReadableSubset

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
