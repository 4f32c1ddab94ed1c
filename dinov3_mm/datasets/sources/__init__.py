"""Where images come from."""

from dinov3_mm.datasets.sources.base import FileSource, ImageSource
from dinov3_mm.datasets.sources.decode import IMAGE_EXTENSIONS, BrokenImageError, read_image
from dinov3_mm.datasets.sources.image_folder import ImageFolder
from dinov3_mm.datasets.sources.image_list import ImageList
from dinov3_mm.datasets.sources.mixture import BatchMixture, WeightedConcat
from dinov3_mm.datasets.sources.mm_dataset import MMDatasetSource
from dinov3_mm.datasets.sources.multiband import ImageHeader
from dinov3_mm.datasets.sources.pixel_format import PixelFormat
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
