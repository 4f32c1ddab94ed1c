"""The one decoder: image files (TIFF of any bands too), bytes and PIL images to pixels."""

import io
import math
import os
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

# --- TIFF files with any number of bands and any pixel type, through tifffile ---


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


# --- The one decoder: image files, their bytes and PIL images to 8-bit pixels ---
#
# Every route reads images here: the sources of pretraining, feature extraction, prediction, and
# the pipelines of the hosts (:mod:`dinov3_mm.datasets.transforms.host_steps`). A file has the same
# pixels everywhere:
#
# - the EXIF orientation is applied, as by ``PIL.ImageOps.exif_transpose``: images are as one sees
#   them;
# - alpha is dropped, as by ``PIL.Image.convert``, and nothing is laid behind it: so the released
#   weights saw their images, and a pixel does not depend on a background that somebody chose.
#   Where hidden colours are in the way, composite the images beforehand;
# - 16 bits keep their upper eight; wider integers and floats have no range of 8 bits and are
#   refused;
# - of animations, bursts and pages the first is read; colour profiles and gamma are not applied;
# - an image of more than :func:`max_pixels` pixels is refused, before it takes memory.


# The largest that OpenCV decodes; 3 GiB as RGB.
MAX_PIXELS = 2**30
MAX_PIXELS_VARIABLE = "DINOV3_MM_MAX_PIXELS"
COLOR_CHANNELS = {"rgb": 3, "gray": 1}
# Formats whose pixels PIL hands over as 32-bit integers although they have 16 bits.
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")

_EXIF_ORIENTATION = 274
_OBJECT = re.compile(r" <_io\.\w+ [^>]*>")
_JPEG_FORMATS = ("JPEG", "MPO")  # a camera's MPO is a JPEG with further images behind it
_JPEG_END = b"\xff\xd9"
_JPEG_PADDING = 64
# IMREAD_REDUCED_COLOR_k is one of these flags together with IMREAD_COLOR.
_REDUCTIONS = tuple((factor, 8 * factor) for factor in (2, 4, 8))
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
_PIL_ADVICE = "pass an array in 0..255, of uint8 or floating point"
# What lies under an image's name in place of an image, by how it begins.
_STRANGERS = (
    (b"version https://git-lfs", "a Git LFS pointer, the image was not fetched (git lfs pull)"),
    (b"<!DOCTYPE", "a web page, maybe of a failed download"),
    (b"<html", "a web page, maybe of a failed download"),
    (b"<?xml", "an XML or SVG document"),
    (b"<svg", "an SVG document"),
    (b"%PDF", "a PDF document"),
)
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


class BrokenImageError(ValueError):
    """An image that cannot be read.

    Args:
        path (str): The file.
        reason (str): What the reader said; empty where torch raises the error of a worker anew,
            with its whole text as the only argument.
    """

    def __init__(self, path: str, reason: str = "") -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.reason else self.path


class Decoded(NamedTuple):
    """An image as one sees it.

    Attributes:
        pixels: (H, W, C).
        orientation: EXIF orientation by which the stored pixels were turned, 1 to 8.
    """

    pixels: np.ndarray
    orientation: int


class ImageHeader(NamedTuple):
    """What a file says before any pixel is decoded.

    Attributes:
        height: in pixels, of the image as one sees it.
        width: in pixels.
        channels: stored channels; alpha counts.
    """

    height: int
    width: int
    channels: int


def max_pixels() -> int:
    """Pixels that an image may have: ``DINOV3_MM_MAX_PIXELS`` of the environment, else 2 ** 30.

    Raises:
        ValueError: If the variable is no positive number.
    """
    stated = os.environ.get(MAX_PIXELS_VARIABLE)
    if not stated:
        return MAX_PIXELS
    if not stated.isdecimal() or int(stated) < 1:
        raise ValueError(f"{MAX_PIXELS_VARIABLE}={stated!r}: expected a number of pixels")
    return int(stated)


def check_pixels(height: int, width: int) -> None:
    """Raise ValueError if an image is larger than :func:`max_pixels`."""
    limit = max_pixels()
    if height * width > limit:
        raise ValueError(
            f"{width}x{height} are {height * width} pixels, more than the limit of {limit}; "
            f"{MAX_PIXELS_VARIABLE}={height * width} in the environment would read it"
        )


def read_bytes(path: str | os.PathLike) -> bytes:
    """Content of a file; BrokenImageError if it cannot be had."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BrokenImageError(str(path), error.strerror or str(error)) from error
    except ValueError as error:  # a null byte in the name
        raise BrokenImageError(repr(str(path)), str(error)) from error


def read_image(path: str, color: str = "rgb", min_side: int | None = None) -> np.ndarray:
    """Read a file as an ``(H, W, 3)`` (``'rgb'``) or ``(H, W, 1)`` (``'gray'``) uint8 array.

    Args:
        path (str): The file.
        color (str): ``'rgb'`` or ``'gray'``.
        min_side (int | None): Decode a JPEG at 1/2, 1/4 or 1/8 of its size as long as its shorter
            side keeps this many pixels; None: at full size.

    Raises:
        BrokenImageError: If the file cannot be read or decoded completely.
    """
    return decode_image(read_bytes(path), str(path), color, min_side)


def decode_image(
    data: bytes, path: str, color: str = "rgb", min_side: int | None = None
) -> np.ndarray:
    """Decode the bytes of an image file, see :func:`read_image`; ``path`` is for messages."""
    return decode_oriented(data, path, color, min_side).pixels


def decode_oriented(
    data: bytes, path: str, color: str = "rgb", min_side: int | None = None
) -> Decoded:
    """As :func:`decode_image`, with the orientation for maps that belong to the image."""
    try:
        try:
            with opened(data) as image:
                if not is_misread(image):
                    return _decode_opened(image, data, color, min_side)
            return _decode_other_tiff(data, color)
        except UnidentifiedImageError:
            if not data.startswith(TIFF_STARTS):
                raise
            return _decode_other_tiff(data, color)
    except Exception as error:  # decoders raise anything on damaged bytes
        raise BrokenImageError(path, explain(error, data)) from error


def pil_pixels(image: Image.Image, color: str = "rgb") -> np.ndarray:
    """Pixels of a PIL image by the rules for files, see :func:`read_image`.

    Raises:
        BrokenImageError: If its file turns out to be damaged.
        ValueError: If its pixels have no range of 8 bits, or PIL has mixed them up.
    """
    if is_misread(image):
        raise ValueError(
            "PIL mixes up the colours of planar 16-bit TIFF files; pass the path of the file"
        )
    try:
        with _pil_rules():
            return turned(_eight_bits(image, color, _PIL_ADVICE), orientation_of(image))
    except OSError as error:  # PIL decodes when the pixels are asked for
        name = getattr(image, "filename", "") or "a PIL image"
        raise BrokenImageError(str(name), f"{type(error).__name__}: {error}") from error


def read_size(path: str) -> tuple[int, int]:
    """Height and width from the header of an image file, as one sees it.

    Raises:
        BrokenImageError: If the header cannot be read.
    """
    return read_frame(path)[0]


def read_frame(path: str) -> tuple[tuple[int, int], int]:
    """As :func:`read_size`, with the EXIF orientation by which the stored pixels are turned."""
    start = b""
    try:
        with open(path, "rb") as file:
            start = file.read(32)
            file.seek(0)
            with opened(file) as image:
                _check_depth(image, UNCHANGED_ADVICE)
                return displayed_size(image), orientation_of(image)
    except UnidentifiedImageError as error:
        if start.startswith(TIFF_STARTS):
            return _other_tiff_size(path), 1
        raise BrokenImageError(str(path), explain(error, start)) from error
    except Exception as error:  # decoders raise anything on damaged bytes
        raise BrokenImageError(str(path), explain(error, start)) from error


@contextmanager
def opened(data: bytes | io.IOBase) -> Iterator[Image.Image]:
    """A PIL image of a file's bytes under this module's rules; nothing is decoded yet.

    Raises:
        ValueError: If it is larger than :func:`max_pixels`; PIL raises anything else.
    """
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    with _pil_rules(), Image.open(file) as image:
        check_pixels(image.height, image.width)
        yield image


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, by which PIL's pixels are to be turned; 1 if none is stated."""
    try:
        stated = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata does not make an image unreadable
        return 1
    return stated if stated in range(1, 9) else 1


def displayed_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image after it is turned."""
    tags = getattr(image, "tag_v2", {})
    # PIL's size of a TIFF file may be that of the stored or of the turned image.
    width, height = tags.get(256, image.width), tags.get(257, image.height)
    return (width, height) if orientation_of(image) > 4 else (height, width)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels (H, W, ...) as they are to be seen under an EXIF orientation."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels if orientation == 1 else np.ascontiguousarray(pixels)


def explain(error: Exception, start: bytes) -> str:
    """What was wrong with a file that begins with ``start``, in the words of the decoder."""
    # PIL names the object it read from, with an address that differs in every run.
    reason = _OBJECT.sub("", f"{type(error).__name__}: {error}")
    if not start:
        return "the file is empty"
    if not isinstance(error, UnidentifiedImageError):
        return reason
    for beginning, what in _STRANGERS:
        if start[:32].lstrip().lower().startswith(beginning.lower()):
            return f"{reason}; it is {what}"
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS:
        return f"{reason}; it is a HEIC photo: store it as JPEG or PNG"
    return reason


# PIL refuses large images and notes, each by a limit of its own that the other decoders lack.
_PIL_LIMITS = (
    (Image, "MAX_IMAGE_PIXELS", None),
    (PngImagePlugin, "MAX_TEXT_CHUNK", 2**26),
    (PngImagePlugin, "MAX_TEXT_MEMORY", 2**28),
)
_rules_lock = threading.Lock()
_rules_depth = 0
_foreign_limits: list[int | None] = []


@contextmanager
def _pil_rules() -> Iterator[None]:
    """PIL with this module's limits and without warnings; the caller's come back afterwards."""
    global _rules_depth
    with _rules_lock:
        if _rules_depth == 0:
            _foreign_limits[:] = [getattr(module, name) for module, name, _ in _PIL_LIMITS]
            for module, name, limit in _PIL_LIMITS:
                setattr(module, name, limit)
        _rules_depth += 1
    try:
        with warnings.catch_warnings():
            # Of damaged metadata and unusual palettes, for every file again.
            warnings.simplefilter("ignore")
            yield
    finally:
        with _rules_lock:
            _rules_depth -= 1
            if _rules_depth == 0:
                for (module, name, _), limit in zip(_PIL_LIMITS, _foreign_limits):
                    setattr(module, name, limit)


def _decode_opened(image: Image.Image, data: bytes, color: str, min_side: int | None) -> Decoded:
    stated = orientation_of(image) if image.format != "PNG" else 1
    if image.format in _JPEG_FORMATS:
        # OpenCV decodes JPEG a third faster than PIL, to the same values, but OpenCV 4 fills up a
        # truncated file with grey, and it has CMYK colours of its own.
        if image.mode in ("RGB", "L") and _JPEG_END in data[-_JPEG_PADDING:]:
            pixels = _decode_jpeg(data, color, _reduction(image, min_side))
            if pixels is not None:
                return Decoded(turned(pixels, stated), stated)
        if image.mode in ("RGB", "L"):
            # The decoder's own grey and reduction, as above.
            factor = _reduction(image, min_side)
            size = tuple(side // factor for side in image.size)
            image.draft("L" if color == "gray" else image.mode, size)
    image.load()
    left = orientation_of(image)  # PIL turns TIFF itself; PNG may state it behind the pixels
    pixels = turned(_eight_bits(image, color, UNCHANGED_ADVICE), left)
    return Decoded(pixels, stated if image.format == "TIFF" else left)


def _reduction(image: Image.Image, min_side: int | None) -> int:
    """The strongest of the factors that libjpeg offers that keeps the shorter side."""
    if min_side is None:
        return 1
    side = min(image.size)
    return max((factor for factor, _ in _REDUCTIONS if side // factor >= min_side), default=1)


def _decode_jpeg(data: bytes, color: str, factor: int) -> np.ndarray | None:
    flags = cv2.IMREAD_COLOR if color == "rgb" else cv2.IMREAD_GRAYSCALE
    flags |= cv2.IMREAD_IGNORE_ORIENTATION | dict(_REDUCTIONS).get(factor, 0)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    if image is None:
        return None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image) if color == "rgb" else image[..., None]


def _eight_bits(image: Image.Image, color: str, advice: str) -> np.ndarray:
    """Stored pixels of a PIL image as ``(H, W, C)`` uint8."""
    _check_depth(image, advice)
    if image.mode in (*_SIXTEEN_BIT_MODES, "I"):
        # PIL's own conversion would clip everything above 255 to white.
        gray = (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(gray[..., None], COLOR_CHANNELS[color], axis=2)
    if "transparency" in image.info:
        # Without the note, PIL converts the colours alone, and does not look for a substitute.
        image.load()
        image = image.copy()
        del image.info["transparency"]
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    pixels = np.array(image.convert("RGB" if color == "rgb" else "L"))
    return pixels if color == "rgb" else pixels[..., None]


def _check_depth(image: Image.Image, advice: str) -> None:
    """Raise ValueError for pixels without a range of 8 bits."""
    if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN_BIT_FORMATS):
        kind = "float" if image.mode == "F" else "integer"
        raise ValueError(f"32-bit {kind} pixels have no defined 8-bit range; {advice}")


def _decode_other_tiff(data: bytes, color: str) -> Decoded:
    check_pixels(*tiff_shape(io.BytesIO(data), colors=True)[:2])
    pixels, orientation, _ = decode_colors(data)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return Decoded(turned(_eight_bits(image, color, UNCHANGED_ADVICE), orientation), orientation)


def _other_tiff_size(path: str) -> tuple[int, int]:
    try:
        height, width, _ = tiff_shape(path, colors=True)
    except Exception as error:  # as above
        raise BrokenImageError(str(path), f"{type(error).__name__}: {error}") from error
    return height, width
