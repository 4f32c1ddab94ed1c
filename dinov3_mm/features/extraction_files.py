"""What an earlier run has left: which of its rows still belong to their images."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .files import FileState, file_states, is_same, some
from .load import INDEX_FILE, RaggedRows, open_index, open_shards
from .shards import GRID_SUFFIX, read_shard_header

# An output of which so few images are left belongs to another data set.
_LEAST_SHARED = 0.5


class EarlierRun:
    """Rows of a run by image.

    Args:
        paths: images in row order.
        files: states of their files.
        left_out: images without features.
        arrays: opens the fields.
    """

    def __init__(
        self, paths: Sequence[str], files: Sequence, left_out: Sequence[Mapping], arrays: Any
    ) -> None:
        self.rows = {path: row for row, path in enumerate(paths)}
        self.files = dict(zip(paths, files, strict=True))
        self.files.update({entry["path"]: entry.get("file") for entry in left_out})
        self._open = arrays
        self._arrays: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, folder: Path, out: Path, index: dict | None = None) -> "EarlierRun | None":
        """The run whose shards lie in ``folder``, or whose index says that it ended in ``out``.

        Returns:
            None if there is none, or one of a version that did not note the files.
        """
        if index is None and (folder / INDEX_FILE).is_file():
            index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        if index is not None:
            if "files" not in index:
                return None
            place = out if out.suffix else folder
            arrays = lambda: open_index(place, index)  # noqa: E731
            return cls(index["paths"], index["files"], index["left_out"], arrays)
        shards = sorted(folder.glob("features-*.safetensors"))
        headers = [read_shard_header(shard) for shard in shards]
        if not all("files" in header for header in headers) or not shards:
            return None
        paths, files, left_out = (
            [entry for header in headers for entry in header[key]]
            for key in ("paths", "files", "left_out")
        )
        return cls(paths, files, left_out, lambda: open_shards(shards))

    def row(self, path: str, state: FileState | None) -> dict[str, Sequence] | None:
        """The fields of an image, each with one row; None without it, or if its file is another."""
        row = self.rows.get(path)
        if row is None or not is_same(self.files[path], state):
            return None
        self._arrays = self._open() if self._arrays is None else self._arrays
        fields: dict[str, Sequence] = {}
        for name, array in self._arrays.items():
            fields[name] = np.asarray(array[row])[None]
            if isinstance(array, RaggedRows):
                fields[name + GRID_SUFFIX] = np.asarray(array.grids[row])[None]
        return fields


def compare_images(
    earlier: EarlierRun | None, paths: Sequence[str], *, same_list: bool, content: bool
) -> list[str] | None:
    """What happened to the images of an earlier run, in words.

    Args:
        earlier: the run; None if it did not note its files.
        paths: the images now.
        same_list: they were the run's; those that it does not know are those that it did not reach.
        content: compare files by a hash of their bytes too.

    Returns:
        Nothing if they are the same; None if most of them are gone, or nothing is known.
    """
    if earlier is None:
        return None
    known = earlier.files
    shared = [path for path in paths if path in known]
    if len(shared) < _LEAST_SHARED * len(known):
        return None
    states = file_states(shared, content=content)
    changed = [p for p, now in zip(shared, states, strict=True) if not is_same(known[p], now)]
    there = set(paths)
    gone = [path for path in known if path not in there]
    new = [] if same_list else [path for path in paths if path not in known]
    parts = (
        ("changed since: computed anew", changed),
        ("are new", new),
        ("are gone: their rows are dropped", gone),
    )
    return [f"{len(names)} images {what}: {some(names)}" for what, names in parts if names]
