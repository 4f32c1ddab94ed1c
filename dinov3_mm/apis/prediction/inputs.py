"""What users hand over to predict on, and the pictures they get back."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from dinov3_mm.checkpoints import atomic_write
from dinov3_mm.datasets.images import pil_pixels, read_image
from dinov3_mm.datasets.sources import ImageFolder

# --- From arrays, files, folders and videos: one image after the other ---


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


# --- Overlays as files: a PNG for an image, a video for a video ---


class PictureWriter:
    """Writes overlays into a folder as they come; a context manager.

    An image becomes ``NAME.png``. Frames of a video become ``NAME.mp4``, which appears when it is
    complete.

    Args:
        folder: where to write; made if it is not there. None writes nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._video: Path | None = None
        self._stream: cv2.VideoWriter | None = None
        self._shape: tuple[int, ...] = ()

    def __enter__(self) -> "PictureWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._close(complete=kind is None)

    def write(self, image: NamedImage, overlay: np.ndarray) -> None:
        """Write the overlay (H, W, 3) uint8 RGB of an image or frame."""
        if self.folder is None:
            return
        if image.video != self._video:
            self._close(complete=True)
            self._video = image.video
        if image.video is None:
            target = (self.folder / image.name).with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            encoded = cv2.imencode(".png", overlay[..., ::-1])[1]
            with atomic_write(target) as partial:
                partial.write_bytes(encoded.tobytes())
            return
        if self._stream is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._shape = overlay.shape
            size = (overlay.shape[1], overlay.shape[0])
            code = cv2.VideoWriter_fourcc(*"mp4v")
            rate = frame_rate(image.video)
            self._stream = cv2.VideoWriter(str(self._partial()), code, rate, size)
        self._stream.write(np.ascontiguousarray(_fitted(overlay, self._shape)[..., ::-1]))

    def _partial(self) -> Path:
        return self.folder / f".{self._video.stem}.partial.mp4"

    def _close(self, *, complete: bool) -> None:
        if self._stream is None:
            return
        self._stream.release()
        self._stream = None
        if complete:
            self._partial().replace(self.folder / f"{self._video.stem}.mp4")
        else:
            self._partial().unlink(missing_ok=True)


def _fitted(overlay: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A frame as large as the first one, which a video needs: cut, or framed in white."""
    if overlay.shape == shape:
        return overlay
    frame = np.full(shape, 255, np.uint8)
    height, width = min(shape[0], overlay.shape[0]), min(shape[1], overlay.shape[1])
    frame[:height, :width] = overlay[:height, :width]
    return frame
