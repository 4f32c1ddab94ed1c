"""What a source makes of the pixels of its files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dinov3_mm.datasets.sources.decode import (
    BrokenImageError,
    decode_image,
    read_image,
    read_image_size,
)
from dinov3_mm.datasets.sources.multiband import ImageHeader, decode_unchanged, read_header
from dinov3_mm.suggest import hint

UNCHANGED = "unchanged"
COLOR_MODES = {"rgb": 3, "gray": 1, UNCHANGED: None}
DEFAULT_RANGES = {"bool": (0, 1), "uint8": (0, 255), "uint16": (0, 65535)}
_STRAY_SHARE = 0.01


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
            :func:`~dinov3_mm.datasets.sources.decode.read_image`.

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
        if self.color != UNCHANGED:
            return read_image(path, self.color, self.min_side)
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise BrokenImageError(str(path), error.strerror or str(error)) from error
        return self.decode(data, str(path))

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
        return ImageHeader(*read_image_size(path), COLOR_MODES[self.color])

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
