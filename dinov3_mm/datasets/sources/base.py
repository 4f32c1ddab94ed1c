"""What an image source offers, and the compact list of paths behind the file-based ones."""

import os
from array import array
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dinov3_mm.datasets.images import ImageHeader
from dinov3_mm.datasets.multiband import PixelFormat


@runtime_checkable
class ImageSource(Protocol):
    """Indexed images; anything with these methods can be trained on.

    A source may also offer ``label(index) -> int`` with ``classes`` (names), and
    ``probe(index)``, an :class:`~dinov3_mm.datasets.images.ImageHeader` read without any pixel.
    """

    def __len__(self) -> int:
        """Number of images."""

    def load_image(self, index: int) -> np.ndarray:
        """``(H, W, C)`` uint8, or float32 in 0..255; BrokenImageError if it cannot be read."""

    def path(self, index: int) -> str:
        """Name of the image for messages."""


class PathIndex:
    """Append-only list of paths in one byte buffer.

    A Python list of a million strings costs every worker process a copy of its memory sooner or
    later, because reading an element writes its reference count; here there are two buffers that
    are only read.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("Q")

    def append(self, path: str) -> None:
        """Add a path."""
        self._bytes += os.fsencode(path)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self._ends):
            raise IndexError(f"index {index} is outside {len(self._ends)} paths")
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(bytes(self._bytes[start : self._ends[index]]))

    def feed(self, digest: Any) -> None:
        """Feed all paths in their order to a hash of :mod:`hashlib`."""
        digest.update(self._bytes)
        digest.update(self._ends)


class FileSource:
    """Base of the sources that read image files by path.

    Args:
        root (str): Folder that relative paths start from.
        color (str): ``'rgb'``, ``'gray'`` (one channel) or ``'unchanged'`` (as in the files).
        decode_min_side (int | None): See
            :func:`~dinov3_mm.datasets.images.read_image`.
        channels (Sequence[int] | None): See
            :class:`~dinov3_mm.datasets.multiband.PixelFormat`.
        value_range (tuple[float, float] | None): See there.

    Attributes:
        classes (tuple[str, ...]): Class names; empty without labels.
        format (PixelFormat): How the files are decoded.
    """

    classes: tuple[str, ...] = ()

    def __init__(
        self,
        root: str,
        color: str = "rgb",
        decode_min_side: int | None = None,
        *,
        channels: Sequence[int] | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        self.root = os.path.expanduser(root)
        self.format = PixelFormat(
            color, channels=channels, value_range=value_range, min_side=decode_min_side
        )
        self._paths = PathIndex()
        self._labels = array("q")

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        """Path of an image."""
        return os.path.join(self.root, self._paths[index])

    def load_image(self, index: int) -> np.ndarray:
        """``(H, W, C)`` uint8, or float32 in 0..255; BrokenImageError if it cannot be read."""
        return self.format.read(self.path(index))

    def probe(self, index: int) -> ImageHeader:
        """Size and channels from the file header; BrokenImageError if it cannot be read."""
        return self.format.probe(self.path(index))

    def feed_names(self, digest: Any) -> None:
        """Feed the names of all images, relative to the root, to a hash of :mod:`hashlib`."""
        self._paths.feed(digest)

    def label(self, index: int) -> int:
        """Class of an image; ValueError if the source has no labels."""
        if not self._labels:
            raise ValueError(f"{type(self).__name__} of {self.root} has no labels")
        return self._labels[index]
