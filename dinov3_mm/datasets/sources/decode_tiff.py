"""TIFF files with any number of bands and any pixel type, through tifffile."""

import io
import math
import os
import struct
from types import ModuleType

import numpy as np

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def decode_tiff(data: bytes) -> np.ndarray:
    """Read the first image of a TIFF file as ``(H, W, C)`` in its own pixel type.

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
    order = [rows, columns, *bands]
    rest = [axis for axis in range(pixels.ndim) if axis not in order]
    pixels = pixels.transpose(*order, *rest)
    return pixels.reshape(*pixels.shape[:2], -1)


def tiff_shape(file_or_path: str | os.PathLike | io.BytesIO) -> tuple[int, int, int]:
    """Rows, columns and bands from the header of a TIFF file; raises as :func:`decode_tiff`."""
    with _tifffile().TiffFile(file_or_path) as file:
        series = file.series[0]
        shape = dict(zip(series.axes, series.shape))
        bands = _band_axis(series.axes, series.shape)
        return shape["Y"], shape["X"], math.prod(series.shape[axis] for axis in bands)


def _tifffile() -> ModuleType:
    try:
        import tifffile
    except ImportError as error:
        raise ImportError(
            "TIFF files with color='unchanged' need tifffile: pip install 'dinov3_mm[data]'"
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
