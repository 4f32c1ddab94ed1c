"""Images of any channels and precision: ``color='unchanged'``, and what a source asks of its files.

The rest of :mod:`dinov3_mm.datasets.images` applies here too: the EXIF orientation, the limit of
pixels, one error for damaged files. Alpha counts as a channel.
"""

import io
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from dinov3_mm.datasets.images import (
    COLOR_CHANNELS,
    SIXTEEN_BIT_FORMATS,
    BrokenImageError,
    Decoded,
    ImageHeader,
    check_pixels,
    decode_image,
    displayed_size,
    explain,
    opened,
    orientation_of,
    read_bytes,
    read_size,
    turned,
)
from dinov3_mm.errors import hint

from .images import TIFF_STARTS, decode_tiff, tiff_shape

UNCHANGED = "unchanged"
COLOR_MODES = {**COLOR_CHANNELS, UNCHANGED: None}
DEFAULT_RANGES = {"bool": (0, 1), "uint8": (0, 255), "uint16": (0, 65535)}
NPY_START = b"\x93NUMPY"
_STRAY_SHARE = 0.01
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND"
_PNG_DEPTH_AT = 24
# Palette entries are no pixel values, and one-bit pixels are 0 and 255 everywhere else.
_EXPANDED_MODES = {"P": "RGB", "PA": "RGBA", "1": "L"}


class PixelFormat:
    """Decodes image files to one representation: ``(H, W, C)`` uint8, or float32 in 0..255.

    Args:
        color (str): ``'rgb'`` or ``'gray'`` convert to 8 bits and three channels or one;
            ``'unchanged'`` keeps the channels and the precision of the file.
        channels (Sequence[int] | None): For ``'unchanged'``: the channels to keep, counted from 0,
            in this order; None: all.
        value_range (tuple[float, float] | None): For ``'unchanged'``: stored values that become 0
            and 1 on the scale of mean and std (0 and 255 within the pipeline); values outside are
            clipped. None: 0..255 for 8-bit, 0..65535 for 16-bit, 0..1 for float pixels.
        min_side (int | None): For ``'rgb'`` and ``'gray'``: see
            :func:`~dinov3_mm.datasets.images.read_image`.

    Raises:
        ValueError: If an argument is unknown, out of range, or does not belong to the color mode.
    """

    def __init__(
        self,
        color: str = "rgb",
        *,
        channels: Sequence[int] | None = None,
        value_range: tuple[float, float] | None = None,
        min_side: int | None = None,
    ) -> None:
        if color not in COLOR_MODES:
            raise ValueError(
                f"color must be one of {tuple(COLOR_MODES)}, got {color!r}; "
                f"{hint(str(color), COLOR_MODES)}"
            )
        given = {"channels": channels, "value_range": value_range}
        for name, value in given.items():
            if value is not None and color != UNCHANGED:
                raise ValueError(f"{name}={value} needs color='unchanged', got color={color!r}")
        if min_side is not None and color == UNCHANGED:
            raise ValueError("decode_min_side reduces 8-bit JPEGs: it needs color='rgb' or 'gray'")
        self.color = color
        self.channels = None if channels is None else _channel_list(channels)
        self.value_range = None if value_range is None else _range(value_range)
        self.min_side = min_side

    def read(self, path: str) -> np.ndarray:
        """Decode a file; BrokenImageError if that fails."""
        return self.decode(read_bytes(path), str(path))

    def decode(self, data: bytes, path: str) -> np.ndarray:
        """Decode the bytes of a file; ``path`` is for messages."""
        if self.color != UNCHANGED:
            return decode_image(data, path, self.color, self.min_side)
        pixels = decode_unchanged(data, path)
        if self.channels is not None:
            if max(self.channels) >= pixels.shape[2]:
                raise BrokenImageError(
                    path, f"has {pixels.shape[2]} channels, not those of channels={self.channels}"
                )
            pixels = pixels[..., self.channels]
        return self._scaled(pixels, path)

    def probe(self, path: str) -> ImageHeader:
        """Height, width and stored channels of a file (3 or 1 for ``'rgb'`` and ``'gray'``)."""
        if self.color == UNCHANGED:
            return read_header(path)
        return ImageHeader(*read_size(path), COLOR_MODES[self.color])

    def _scaled(self, pixels: np.ndarray, path: str) -> np.ndarray:
        """8-bit pixels as they are, all others as float32 in 0..255."""
        name = pixels.dtype.name
        is_float = pixels.dtype.kind == "f"
        if is_float and not np.isfinite(pixels).all():
            raise BrokenImageError(path, "holds NaN or infinite values; fill them beforehand")
        bounds = self.value_range or ((0, 1) if is_float else DEFAULT_RANGES.get(name))
        if bounds is None:
            raise BrokenImageError(
                path, f"{name} pixels have no natural range; set value_range=(low, high)"
            )
        if pixels.dtype == np.uint8 and bounds == (0, 255):
            return np.ascontiguousarray(pixels)
        if is_float and self.value_range is None:
            _check_unit_range(pixels, path)
        low, high = bounds
        # 16 bits fit float32 exactly; wider pixels are scaled before they are rounded.
        wide = pixels.dtype.itemsize > 2 and name != "float32"
        scaled = pixels.astype(np.float64 if wide else np.float32)
        scaled -= low
        scaled *= 255 / (high - low)
        np.clip(scaled, 0, 255, out=scaled)
        return np.ascontiguousarray(scaled, dtype=np.float32)


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
        pixels, orientation = _decode(data)
        pixels = turned(pixels, orientation)
    except ImportError:
        raise
    except Exception as error:  # decoders raise anything on damaged bytes
        raise BrokenImageError(path, explain(error, data)) from error
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or not pixels.size:
        raise BrokenImageError(path, f"expected (height, width, channels), got {pixels.shape}")
    return pixels


def decode_map(data: bytes, path: str, *, palette: bool) -> np.ndarray:
    """Decode a map of labels or depths: the values as stored, (H, W), or (H, W, C) for colours.

    Args:
        data: bytes of an image or ``.npy`` file.
        path: for messages.
        palette: take the indices of palette images; else their colours.

    Raises:
        BrokenImageError: If it cannot be decoded completely.
    """
    try:
        if data.startswith(NPY_START):
            return np.load(io.BytesIO(data), allow_pickle=False)
        try:
            with opened(data) as image:
                image.load()
                return np.array(
                    image.convert("RGB") if image.mode == "P" and not palette else image
                )
        except UnidentifiedImageError:
            if not data.startswith(TIFF_STARTS):
                raise
        pixels = _decode(data).pixels
        return pixels[..., 0] if pixels.shape[2] == 1 else pixels
    except Exception as error:  # decoders raise anything on damaged bytes
        raise BrokenImageError(path, explain(error, data)) from error


def read_header(path: str) -> ImageHeader:
    """Size and channels of an image file; raises as :func:`decode_unchanged`."""
    start = b""
    try:
        with open(path, "rb") as file:
            start = file.read(32)
            if start.startswith(TIFF_STARTS):
                return ImageHeader(*tiff_shape(path))
            if start.startswith(NPY_START):
                shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
                return ImageHeader(*shape[:2], shape[2] if len(shape) > 2 else 1)
            file.seek(0)
            with opened(file) as image:
                bands = Image.getmodebands(_EXPANDED_MODES.get(image.mode, image.mode))
                return ImageHeader(*displayed_size(image), bands)
    except ImportError:
        raise
    except OSError as error:
        raise BrokenImageError(str(path), error.strerror or explain(error, start)) from error
    except Exception as error:  # decoders raise anything on damaged bytes
        raise BrokenImageError(str(path), explain(error, start)) from error


def _decode(data: bytes) -> Decoded:
    if data.startswith(TIFF_STARTS):
        check_pixels(*tiff_shape(io.BytesIO(data))[:2])
        image = decode_tiff(data)
        return Decoded(image.pixels, image.orientation)
    if data.startswith(NPY_START):
        return Decoded(np.load(io.BytesIO(data), allow_pickle=False), 1)
    with opened(data) as image:
        if data.startswith(_PNG_START) and data[_PNG_DEPTH_AT] == 16:
            return Decoded(_decode_deep_png(data), orientation_of(image))
        image.load()
        mode = _EXPANDED_MODES.get(image.mode)
        pixels = np.array(image.convert(mode) if mode else image)
        if image.mode == "I" and image.format in SIXTEEN_BIT_FORMATS:
            pixels = pixels.astype(np.uint16)
        return Decoded(pixels, orientation_of(image))


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


def _check_unit_range(pixels: np.ndarray, path: str) -> None:
    """Refuse float pixels that the default range would clip away."""
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        stray = float(((pixels < 0) | (pixels > 1)).mean())
        if stray > _STRAY_SHARE:
            raise BrokenImageError(
                path,
                f"{stray:.0%} of the float pixels lie outside 0..1 (they span {low:g}..{high:g}); "
                "set value_range=(low, high)",
            )


def _channel_list(channels: Sequence[int]) -> list[int]:
    if isinstance(channels, str) or not isinstance(channels, Sequence) or not channels:
        raise ValueError(f"channels must be indices from 0, e.g. (3, 2, 1), got {channels!r}")
    if not all(isinstance(index, int) and index >= 0 for index in channels):
        raise ValueError(f"channels must be indices from 0, e.g. (3, 2, 1), got {channels!r}")
    return list(channels)


def _range(value_range: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(value) for value in value_range)
    except (TypeError, ValueError):
        low = high = 0.0
    if not -float("inf") < low < high < float("inf"):
        raise ValueError(f"value_range must be (low, high) with low < high, got {value_range!r}")
    return low, high
