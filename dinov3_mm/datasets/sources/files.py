"""Images named in a text or CSV file."""

import csv
import os
import re
from array import array
from collections.abc import Iterator, Sequence

from mmengine.registry import DATASETS

from dinov3_mm.datasets.image_files import open_text, text_lines
from dinov3_mm.datasets.sources.base import FileSource

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
