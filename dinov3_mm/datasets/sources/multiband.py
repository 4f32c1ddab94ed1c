"""Image files as they are: every channel, in the pixel type of the file."""

import io
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from dinov3_mm.datasets.sources.decode import BrokenImageError
from dinov3_mm.datasets.sources.decode_tiff import TIFF_STARTS, decode_tiff, tiff_shape

NPY_START = b"\x93NUMPY"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND"
_PNG_DEPTH_AT = 24
# Palette entries are no pixel values, and one-bit pixels are 0 and 255 everywhere else.
_EXPANDED_MODES = {"P": "RGB", "PA": "RGBA", "1": "L"}


class ImageHeader(NamedTuple):
    """What a file says before any pixel is decoded.

    Attributes:
        height: in pixels.
        width: in pixels.
        channels: stored channels; alpha counts.
    """

    height: int
    width: int
    channels: int


def decode_unchanged(data: bytes, path: str) -> np.ndarray:
    """Decode the bytes of an image file to ``(H, W, C)`` without conversion.

    TIFF (interleaved, planar or one band a page), ``.npy`` arrays of shape ``(H, W)`` or
    ``(H, W, C)``, and whatever PIL opens: PNG of 8 and 16 bits, JPEG, WebP, BMP. Palettes are
    resolved to colours.

    Raises:
        BrokenImageError: If the data cannot be decoded completely.
        ImportError: If a TIFF file needs a package that is missing.
    """
    try:
        pixels = _decode(data)
    except ImportError:
        raise
    except Exception as error:  # decoders raise anything on damaged bytes
        raise BrokenImageError(path, f"{type(error).__name__}: {error}") from error
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or not pixels.size:
        raise BrokenImageError(path, f"expected (height, width, channels), got {pixels.shape}")
    return pixels


def read_header(path: str) -> ImageHeader:
    """Size and channels of an image file; raises as :func:`decode_unchanged`."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(len(_PNG_START))
        if start.startswith(TIFF_STARTS):
            return ImageHeader(*tiff_shape(path))
        if start.startswith(NPY_START):
            shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
            return ImageHeader(*shape[:2], shape[2] if len(shape) > 2 else 1)
        with Image.open(path) as image:
            bands = Image.getmodebands(_EXPANDED_MODES.get(image.mode, image.mode))
            return ImageHeader(image.height, image.width, bands)
    except ImportError:
        raise
    except OSError as error:
        raise BrokenImageError(str(path), error.strerror or str(error)) from error
    except Exception as error:  # decoders raise anything on damaged bytes
        raise BrokenImageError(str(path), f"{type(error).__name__}: {error}") from error


def _decode(data: bytes) -> np.ndarray:
    if data.startswith(TIFF_STARTS):
        return decode_tiff(data)
    if data.startswith(NPY_START):
        return np.load(io.BytesIO(data), allow_pickle=False)
    if data.startswith(_PNG_START) and data[_PNG_DEPTH_AT] == 16:
        return _decode_deep_png(data)
    with Image.open(io.BytesIO(data)) as image:
        mode = _EXPANDED_MODES.get(image.mode)
        return np.array(image.convert(mode) if mode else image)


def _decode_deep_png(data: bytes) -> np.ndarray:
    """16-bit PNG, whose colours PIL would cut to 8 bits."""
    # OpenCV returns what it has of a truncated file.
    if _PNG_END not in data[-64:]:
        raise ValueError("truncated: no end marker")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ValueError("OpenCV cannot decode this PNG file")
    if image.ndim == 3:
        image[..., :3] = image[..., 2::-1].copy()
    return image
