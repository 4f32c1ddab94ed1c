"""What users hand over to predict on: arrays, files, folders, videos. One image after the other."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from dinov3_mm.datasets.images import pil_pixels, read_image
from dinov3_mm.datasets.sources import ImageFolder

_EXPECTED = "expected paths, PIL images or uint8 arrays, got a {}"
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")

Input = str | os.PathLike | Image.Image | np.ndarray
Inputs = Input | Iterable[Input]


class NamedImage(NamedTuple):
    """An image to predict on.

    Attributes:
        name: file name, relative to the folder it was found in; ``image-0`` for arrays and PIL
            images, and ``clip.mp4/000012`` for frames.
        pixels: (H, W, 3) uint8, RGB.
        video: file of the video that it is a frame of, else None.
    """

    name: str
    pixels: np.ndarray
    video: Path | None = None


def iterate_images(inputs: Inputs) -> Iterator[NamedImage]:
    """Images of an input or of several, read when they are asked for.

    Args:
        inputs: an (H, W, 3) or (H, W) uint8 RGB array, a PIL image, a file, a video, a folder of
            images (searched through), or a list of such.

    Raises:
        BrokenImageError: a file that cannot be decoded.
        FileNotFoundError: a path where nothing is.
        ValueError: an array of another form, a folder without images, a video without frames.
        TypeError: anything else.
    """
    several = not isinstance(inputs, (str, os.PathLike, Image.Image, np.ndarray))
    if several and not isinstance(inputs, Iterable):
        raise TypeError(_EXPECTED.format(type(inputs).__name__))
    for index, item in enumerate(inputs if several else [inputs]):
        if isinstance(item, np.ndarray):
            yield NamedImage(f"image-{index}", _rgb(item))
        elif isinstance(item, Image.Image):
            yield NamedImage(f"image-{index}", pil_pixels(item))
        elif isinstance(item, (str, os.PathLike)):
            yield from _from_path(Path(item).expanduser())
        else:
            raise TypeError(_EXPECTED.format(type(item).__name__))


def _from_path(path: Path) -> Iterator[NamedImage]:
    if path.is_dir():
        source = ImageFolder(str(path))
        for index in range(len(source)):
            file = Path(source.path(index))
            name = file.relative_to(path) if file.is_relative_to(path) else file
            yield NamedImage(str(name), source.load_image(index))
    elif not path.exists():
        raise FileNotFoundError(f"there is no image, folder or video {path}")
    elif path.suffix.lower() in VIDEO_SUFFIXES:
        yield from _frames(path)
    else:
        yield NamedImage(path.name, read_image(str(path)))


def _frames(path: Path) -> Iterator[NamedImage]:
    capture = cv2.VideoCapture(str(path))
    try:
        index = 0
        while True:
            there, frame = capture.read()
            if not there:
                break
            yield NamedImage(f"{path.name}/{index:06d}", frame[..., ::-1].copy(), path)
            index += 1
    finally:
        capture.release()
    if index == 0:
        raise ValueError(f"no frame of {path} could be decoded")


def frame_rate(path: Path) -> float:
    """Frames per second that a video states; 25 where it states none."""
    capture = cv2.VideoCapture(str(path))
    rate = capture.get(cv2.CAP_PROP_FPS)
    capture.release()
    return rate if rate and np.isfinite(rate) else 25.0


def _rgb(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(
            f"expected a uint8 array (H, W, 3) in RGB or (H, W), got {array.dtype} {array.shape}"
        )
    return array
