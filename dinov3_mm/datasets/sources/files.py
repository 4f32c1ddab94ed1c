"""Image files as sources: what every source offers, folders, lists, readable samples."""

import copy
import csv
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from dinov3_mm.datasets.image_files import (
    LeftOut,
    find_by_class,
    image_extensions,
    open_text,
    text_lines,
)
from dinov3_mm.datasets.images import BrokenImageError, ImageHeader
from dinov3_mm.datasets.multiband import UNCHANGED, PixelFormat

# --- What a source offers, and the list of paths behind those of files ---


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


# --- Folders ---


@DATASETS.register_module()
class ImageFolder(FileSource):
    """Every image file below ``root``, in sorted order, whatever the layout.

    If no image lies directly in ``root``, the folders in ``root`` are classes: ``classes`` are
    their sorted names and ``label`` is the position of an image's folder among them. Hidden
    entries and what operating systems leave behind are skipped; links are followed, to every folder
    once. The log says what was left out.

    Args:
        root (str): The folder.
        color (str): ``'rgb'``, ``'gray'`` (one channel), or ``'unchanged'`` for the channels and
            the precision of the files (TIFF, ``.npy`` and 16-bit PNG).
        decode_min_side (int | None): Decode large JPEGs at 1/2, 1/4 or 1/8 of their size as long as
            the shorter side keeps this many pixels, which is several times faster; None: at full
            size. For 224 px crops of at least 0.32 of the area 448 costs no sharpness.
        channels (Sequence[int] | None): With ``'unchanged'``: the channels to keep, counted from 0,
            in this order; None: all.
        value_range (tuple[float, float] | None): With ``'unchanged'``: the stored values that
            become 0 and 1 on the scale of mean and std; values outside are clipped. None: 0..255
            for 8-bit, 0..65535 for 16-bit, 0..1 for float pixels.
        extensions (tuple[str, ...] | None): File name endings that count as images, in any case;
            None: those that the decoder reads, and ``.npy`` with ``'unchanged'``.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it holds no image.
    """

    def __init__(
        self,
        root: str,
        *,
        color: str = "rgb",
        decode_min_side: int | None = None,
        channels: Sequence[int] | None = None,
        value_range: tuple[float, float] | None = None,
        extensions: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(root, color, decode_min_side, channels=channels, value_range=value_range)
        if extensions is None:
            extensions = image_extensions() + ((".npy",) if color == UNCHANGED else ())
        if not os.path.isdir(self.root):
            what = "is not a folder" if os.path.exists(self.root) else "does not exist"
            raise FileNotFoundError(
                f"image folder {os.path.abspath(self.root)!r} {what}; set root to the folder that "
                "holds the images"
            )
        self.extensions = tuple(extension.lower() for extension in extensions)
        self._index()

    def _index(self) -> None:
        left_out = LeftOut()
        files, folders, below = find_by_class(self.root, self.extensions, left_out)
        for path in files:
            self._paths.append(path)
        for path, label in below:
            self._paths.append(path)
            if not files:
                self._labels.append(label)
        if not self._paths:
            raise ValueError(
                f"no image below {os.path.abspath(self.root)!r}; looked for files that end in "
                f"{', '.join(self.extensions)}" + (f"; {left_out}" if left_out else "")
            )
        left_out.report(self.root, len(self._paths))
        if not files:
            self.classes = tuple(folders)
        self._beside = len(files), len(folders)

    @property
    def stray(self) -> str:
        """An image that lies directly in the folder; empty if there is none."""
        return self.path(0) if self._beside[0] else ""

    def label(self, index: int) -> int:
        """Class of an image; ValueError if the source has no labels."""
        num_files, num_folders = self._beside
        if num_files and num_folders:
            raise ValueError(
                f"ImageFolder of {self.root} has no labels: {num_folders} folders and {num_files} "
                f"images beside them, e.g. {self.stray}; folders are classes where no image lies "
                "beside them"
            )
        return super().label(index)


# --- Lists in text or CSV files ---


_DELIMITERS = (",", ";", "\t")
_NEGATIVE = re.compile(r"-\d+(\.0*)?")
_NUMBER = re.compile(r"\d+")
# Larger ones are identifiers, and would be as many classes.
_LARGEST = 1_000_000


@DATASETS.register_module()
class ImageList(FileSource):
    """Images listed in a file.

    A table has a header with the column ``path`` and optionally ``label``, and commas, semicolons
    or tabs between the columns; any other file has one path per line. Blanks around paths and
    labels do not count, and blank lines are skipped. If all labels are integers they are used as
    they are, otherwise ``classes`` are the sorted distinct labels; an image without a label, or
    with a negative one, is refused. UTF-8, or UTF-16 with its mark at the beginning.

    Args:
        path (str): The list.
        root (str | None): Folder that relative paths start from; None: the folder of the list.
        color (str): ``'rgb'``, ``'gray'`` or ``'unchanged'``, see
            :class:`~dinov3_mm.datasets.sources.ImageFolder`.
        decode_min_side (int | None): See there.
        channels (Sequence[int] | None): See there.
        value_range (tuple[float, float] | None): See there.

    Raises:
        FileNotFoundError: If the list does not exist.
        ValueError: If it names no image or its header lacks ``path``.
    """

    def __init__(
        self,
        path: str,
        root: str | None = None,
        *,
        color: str = "rgb",
        decode_min_side: int | None = None,
        channels: Sequence[int] | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        path = os.path.expanduser(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"image list {os.path.abspath(path)!r} does not exist")
        root = os.path.dirname(path) if root is None else root
        super().__init__(root, color, decode_min_side, channels=channels, value_range=value_range)
        self._read(path)
        if not self._paths:
            raise ValueError(f"image list {os.path.abspath(path)!r} names no image")

    def _read(self, path: str) -> None:
        with open_text(path) as file:
            header = next(text_lines(file, path), "")
        delimiter = next((d for d in _DELIMITERS if d in header), ",")
        columns = [name.strip().strip('"').lower() for name in header.split(delimiter)]
        if path.lower().endswith((".csv", ".tsv")) or ("path" in columns and len(columns) > 1):
            self._read_table(path, columns, delimiter)
            return
        with open_text(path) as file:
            for line in text_lines(file, path):
                if line := line.strip():
                    self._paths.append(line)

    def _read_table(self, path: str, columns: list[str], delimiter: str) -> None:
        if "path" not in columns:
            raise ValueError(
                f"the first line of {path!r} must name a column 'path' (and may name 'label'), "
                f"got {columns}"
            )
        labels = []
        for row in _rows(path, delimiter):
            cells = dict(zip(columns, row))
            if cells.get("path"):
                self._paths.append(cells["path"])
                labels.append(cells.get("label"))
        if "label" in columns:
            self._set_labels(labels, path)

    def _set_labels(self, labels: list[str | None], path: str) -> None:
        for number, label in enumerate(labels):
            if label and not _NEGATIVE.fullmatch(label):
                continue
            what = f"the label {label}" if label else "no label"
            raise ValueError(
                f"image {number} of {path!r} ({self._paths[number]}) has {what}; labels are names, "
                "or numbers from 0: take unlabelled images out of the list, or the column out of it"
            )
        if all(map(_NUMBER.fullmatch, labels)):
            numbers = [int(label) for label in labels]
            largest = max(numbers, default=-1)
            if largest > _LARGEST:
                raise ValueError(
                    f"{path!r} has the label {largest}; numbers are used as they are, as classes "
                    f"from 0 to {_LARGEST}: write identifiers as names, such as id{largest}"
                )
            self._labels = array("q", numbers)
            self.classes = tuple(map(str, range(largest + 1)))
        else:
            self.classes = tuple(sorted(set(labels)))
            lookup = {name: index for index, name in enumerate(self.classes)}
            self._labels = array("q", [lookup[label] for label in labels])


def _rows(path: str, delimiter: str) -> Iterator[list[str]]:
    """Cells of the lines behind the header of a table, without blanks around them."""
    with open_text(path, newline="") as file:
        rows = csv.reader(
            text_lines(file, path), delimiter=delimiter, skipinitialspace=True, strict=True
        )
        try:
            next(rows)
            for row in rows:
                yield [cell.strip() for cell in row]
        except csv.Error as error:
            raise ValueError(
                f"{os.path.abspath(path)}, line {rows.line_num}: {error}; put a name that holds a "
                "quotation mark in quotation marks, and double it"
            ) from error


# --- For evaluation ---


@DATASETS.register_module()
class ReadableSubset:
    """Up to ``length`` images spread evenly over another source, unreadable ones left out.

    Training replaces an unreadable image; an evaluation must not see one twice instead. Every image
    of the sample is loaded once here, so that the set is final before the first evaluation.

    Args:
        source (dict): Config of the source.
        length (int): Largest number of images.

    Attributes:
        classes (tuple[str, ...]): Those of the source.

    Raises:
        ValueError: If ``length < 1`` or fewer than two images can be read.
    """

    def __init__(self, source: dict, length: int = 1000) -> None:
        if length < 1:
            raise ValueError(f"ReadableSubset needs length >= 1, got {length}")
        self.source = DATASETS.build(copy.deepcopy(dict(source)))
        self.classes = tuple(getattr(self.source, "classes", None) or ())
        number = min(length, len(self.source))
        candidates = np.linspace(0, len(self.source) - 1, number).round().astype(int).tolist()
        self.indices = [index for index in candidates if self._is_readable(index)]
        if len(self.indices) < 2:
            raise ValueError(
                f"an evaluation needs two readable images, {len(self.indices)} of "
                f"{number} could be read"
            )
        if len(self.indices) < number:
            print_log(
                f"evaluation leaves out {number - len(self.indices)} of {number} images that "
                "cannot be read",
                logger="current",
            )

    def _is_readable(self, index: int) -> bool:
        try:
            self.source.load_image(index)
        except BrokenImageError:
            return False
        return True

    def __len__(self) -> int:
        return len(self.indices)

    def load_image(self, index: int) -> np.ndarray:
        """``(H, W, C)`` uint8 image."""
        return self.source.load_image(self.indices[index])

    def path(self, index: int) -> str:
        """Where the image comes from."""
        return self.source.path(self.indices[index])

    def label(self, index: int) -> int:
        """Class index, if the source has labels."""
        return self.source.label(self.indices[index])
