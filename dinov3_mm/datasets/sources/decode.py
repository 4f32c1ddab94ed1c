"""Image files to 8-bit arrays, and one error for whatever can be wrong with a file."""

import io
import re
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from dinov3_mm.datasets.sources.decode_tiff import TIFF_STARTS

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

_OBJECT = re.compile(r" <_io\.\w+ [^>]*>")
_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_JPEG_PADDING = 64
# IMREAD_REDUCED_COLOR_k is one of these flags together with IMREAD_COLOR.
_REDUCTIONS = tuple((factor, 8 * factor) for factor in (2, 4, 8))
_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class BrokenImageError(Exception):
    """An image that cannot be read.

    Args:
        path (str): The file.
        reason (str): What the reader said.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def read_image(path: str, color: str = "rgb", min_side: int | None = None) -> np.ndarray:
    """Read a file as an ``(H, W, 3)`` (``'rgb'``) or ``(H, W, 1)`` (``'gray'``) uint8 array.

    The EXIF orientation is ignored and alpha is dropped, as by ``PIL.Image.convert``; 16-bit
    images keep their upper eight bits.

    Args:
        path (str): The file.
        color (str): ``'rgb'`` or ``'gray'``.
        min_side (int | None): Decode a JPEG at 1/2, 1/4 or 1/8 of its size as long as its shorter
            side keeps this many pixels; None: at full size.

    Raises:
        BrokenImageError: If the file cannot be read or decoded completely.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BrokenImageError(str(path), error.strerror or str(error)) from error
    return decode_image(data, str(path), color, min_side)


def decode_image(
    data: bytes, path: str, color: str = "rgb", min_side: int | None = None
) -> np.ndarray:
    """Decode the bytes of an image file, see :func:`read_image`; ``path`` is for messages."""
    # OpenCV decodes JPEG a third faster than PIL, to the same values, but OpenCV 4 fills up a
    # truncated file with grey: only complete files take this way.
    if data.startswith(_JPEG_START) and _JPEG_END in data[-_JPEG_PADDING:]:
        image = _decode_jpeg(data, color, min_side)
        if image is not None:
            return image
    try:
        return _decode_pil(data, color)
    except Exception as error:  # decoders raise anything on damaged bytes
        raise BrokenImageError(path, _reason(error, data[:4])) from error


def read_image_size(path: str) -> tuple[int, int]:
    """Height and width from the header of an image file.

    Raises:
        BrokenImageError: If the header cannot be read.
    """
    start = b""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            file.seek(0)
            with Image.open(file) as image:
                return image.height, image.width
    except Exception as error:  # decoders raise anything on damaged bytes
        raise BrokenImageError(str(path), _reason(error, start)) from error


def _reason(error: Exception, start: bytes) -> str:
    # PIL names the object it read from, with an address that differs in every run.
    reason = _OBJECT.sub("", f"{type(error).__name__}: {error}")
    if isinstance(error, UnidentifiedImageError) and start in TIFF_STARTS:
        reason += "; TIFF files of several bands or of 16-bit colours need color='unchanged'"
    return reason


def _decode_jpeg(data: bytes, color: str, min_side: int | None) -> np.ndarray | None:
    flags = cv2.IMREAD_COLOR if color == "rgb" else cv2.IMREAD_GRAYSCALE
    try:
        flags |= cv2.IMREAD_IGNORE_ORIENTATION | _reduction_flag(data, min_side)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except (cv2.error, OSError):
        return None
    if image is None:
        return None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image) if color == "rgb" else image[..., None]


def _reduction_flag(data: bytes, min_side: int | None) -> int:
    """OpenCV flag for the strongest reduction that keeps the shorter side."""
    if min_side is None:
        return 0
    with Image.open(io.BytesIO(data)) as header:
        side = min(header.size)
    return max((flag for factor, flag in _REDUCTIONS if side // factor >= min_side), default=0)


def _decode_pil(data: bytes, color: str) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        if image.mode in _SIXTEEN_BIT_MODES:
            # PIL's own conversion would clip everything above 255 to white.
            gray = (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
            return np.repeat(gray[..., None], 3 if color == "rgb" else 1, axis=2)
        if image.mode == "F":
            raise ValueError(
                "32-bit float pixels have no defined 8-bit range; read them with color='unchanged'"
            )
        pixels = np.array(image.convert("RGB" if color == "rgb" else "L"))
    return pixels if color == "rgb" else pixels[..., None]
