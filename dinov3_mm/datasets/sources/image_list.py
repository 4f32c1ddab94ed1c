"""Images named in a text or CSV file."""

import csv
import os
from array import array
from collections.abc import Sequence

from mmengine.registry import DATASETS

from dinov3_mm.datasets.sources.base import FileSource


@DATASETS.register_module()
class ImageList(FileSource):
    """Images listed in a file.

    A ``.csv`` file has a header with the column ``path`` and optionally ``label``; any other file
    has one path per line. If all labels are integers they are used as they are, otherwise
    ``classes`` are the sorted distinct labels. Blank lines are skipped.

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
        if path.lower().endswith(".csv"):
            self._read_csv(path)
        else:
            with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
                for line in lines:
                    if line := line.strip():
                        self._paths.append(line)
        if not self._paths:
            raise ValueError(f"image list {os.path.abspath(path)!r} names no image")

    def _read_csv(self, path: str) -> None:
        labels = []
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if "path" not in columns:
                raise ValueError(
                    f"the first line of {path!r} must name a column 'path' (and may name 'label'), "
                    f"got {columns}"
                )
            for row in reader:
                if row["path"]:
                    self._paths.append(row["path"])
                    labels.append(row.get("label"))
        if "label" in columns:
            self._set_labels(labels, path)

    def _set_labels(self, labels: list[str | None], path: str) -> None:
        for number, label in enumerate(labels):
            if not label:
                raise ValueError(f"image {number} of {path!r} ({self._paths[number]}) has no label")
        try:
            self._labels = array("q", [int(label) for label in labels])
            self.classes = tuple(str(label) for label in range(max(self._labels, default=-1) + 1))
        except ValueError:
            self.classes = tuple(sorted(set(labels)))
            lookup = {name: index for index, name in enumerate(self.classes)}
            self._labels = array("q", [lookup[label] for label in labels])
