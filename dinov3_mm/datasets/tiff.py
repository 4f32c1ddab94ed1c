"""TIFF files with any number of bands and any pixel type, through tifffile."""

import io
import math
import os
import struct
from types import ModuleType
from typing import NamedTuple

import numpy as np
from PIL import Image

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
UNCHANGED_ADVICE = "read them with color='unchanged', or store them in 8 or 16 bits"
_BITS_TAG, _ORIENTATION_TAG, _PLANAR_TAG = 258, 274, 284
# What the bands of an image mean, and how many they are.
_COLORS = (("MINISBLACK", 1), ("RGB", 3), ("RGB", 4))


class TiffImage(NamedTuple):
    """What a TIFF file holds.

    Attributes:
        pixels: (H, W, C) as stored, in the pixel type of the file.
        orientation: by which they are to be turned, 1 to 8.
        photometric: what the values mean, such as 'RGB' or 'MINISBLACK'.
    """

    pixels: np.ndarray
    orientation: int
    photometric: str


def decode_tiff(data: bytes) -> TiffImage:
    """Read the first image of a TIFF file.

    Bands may be interleaved, planar, or one a page; of a pyramid the full size is read.

    Raises:
        ImportError: If tifffile is missing, or the codec package that the compression needs.
        ValueError: If the file is truncated, or its axes are not rows, columns and bands. Damaged
            data may raise anything else.
    """
    with _tifffile().TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        bands = _band_axis(series.axes, series.shape)
        _check_complete(file, len(data))
        try:
            pixels = series.asarray()
        except ValueError as error:
            if "imagecodecs" in str(error):
                raise ImportError(
                    f"a TIFF file with {series.keyframe.compression.name} compression needs the "
                    "package imagecodecs: pip install imagecodecs, or store the images uncompressed"
                ) from error
            raise
        rows, columns = series.axes.index("Y"), series.axes.index("X")
        orientation = _orientation(series.keyframe)
        photometric = _photometric(series.keyframe)
    order = [rows, columns, *bands]
    rest = [axis for axis in range(pixels.ndim) if axis not in order]
    pixels = pixels.transpose(*order, *rest)
    return TiffImage(pixels.reshape(*pixels.shape[:2], -1), orientation, photometric)


def decode_colors(data: bytes) -> TiffImage:
    """Read a TIFF file of grey or coloured pixels of 8 or 16 bits as uint8, the upper eight bits.

    Raises:
        ValueError: If it holds something else, such as the bands of a satellite; else as
            :func:`decode_tiff`.
    """
    image = decode_tiff(data)
    _check_colors(image.photometric, image.pixels.shape[2], image.pixels.dtype)
    pixels = image.pixels
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    return image._replace(pixels=np.ascontiguousarray(pixels))


def _check_colors(photometric: str, channels: int, dtype: np.dtype) -> None:
    if (photometric, channels) not in _COLORS or dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"a TIFF file of {channels} {photometric} bands of {dtype} is no 8-bit image; "
            f"{UNCHANGED_ADVICE}"
        )


def is_misread(image: Image.Image) -> bool:
    """Whether PIL opens a TIFF file, but takes the bytes of its deep planes for shallow ones."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_TAG, ())
    return tags.get(_PLANAR_TAG) == 2 and len(bits) > 1 and max(bits) > 8


def tiff_shape(
    file_or_path: str | os.PathLike | io.BytesIO, *, colors: bool = False
) -> tuple[int, int, int]:
    """Rows, columns and bands of the turned image, from the header of a TIFF file.

    Raises as :func:`decode_tiff`, or with ``colors`` as :func:`decode_colors`.
    """
    with _tifffile().TiffFile(file_or_path) as file:
        series = file.series[0]
        shape = dict(zip(series.axes, series.shape))
        bands = _band_axis(series.axes, series.shape)
        size = shape["Y"], shape["X"]
        if _orientation(series.keyframe) > 4:
            size = size[::-1]
        channels = math.prod(series.shape[axis] for axis in bands)
        if colors:
            _check_colors(_photometric(series.keyframe), channels, series.dtype)
        return *size, channels


def _orientation(page) -> int:
    tag = page.tags.get(_ORIENTATION_TAG)
    return int(tag.value) if tag is not None and tag.value in range(1, 9) else 1


def _photometric(page) -> str:
    return getattr(page.photometric, "name", "unknown")


def _tifffile() -> ModuleType:
    try:
        import tifffile
    except ImportError as error:
        raise ImportError(
            "TIFF files of several bands, of 16-bit colours, or with color='unchanged' need "
            "tifffile: pip install 'dinov3_mm[data]'"
        ) from error
    return tifffile


def _band_axis(axes: str, shape: tuple[int, ...]) -> list[int]:
    """The axis of the bands; empty for one band."""
    others = [i for i, name in enumerate(axes) if name not in "YX" and shape[i] > 1]
    if "Y" not in axes or "X" not in axes or len(others) > 1:
        raise ValueError(
            f"axes {axes} of shape {tuple(shape)}; expected rows, columns and one axis of bands"
        )
    return others


def _check_complete(file, size: int) -> None:
    """Raise ValueError if the file ends before its data or its list of pages does.

    tifffile reads the pages that it finds, so a file that lost its last pages would have fewer
    bands.
    """
    last = file.pages[len(file.pages) - 1]
    ends = [
        offset + count
        for page in file.pages
        for offset, count in zip(page.dataoffsets, page.databytecounts)
    ]
    if max(ends, default=0) > size or _next_page(file, last.offset) >= size:
        raise ValueError(f"truncated: the file ends after {size} bytes, within its data")


def _next_page(file, offset: int) -> int:
    """Where the page after the one at ``offset`` begins; 0 after the last."""
    layout, handle = file.tiff, file.filehandle
    handle.seek(offset)
    (entries,) = struct.unpack(layout.tagnoformat, handle.read(layout.tagnosize))
    handle.seek(offset + layout.tagnosize + entries * layout.tagsize)
    (position,) = struct.unpack(layout.offsetformat, handle.read(layout.offsetsize))
    return position
