"""Reading of extracted features, from disk as they are used."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .merge import import_parquet
from .shards import GRID_SUFFIX, map_tensors

INDEX_FILE = "index.json"


class ShardedRows:
    """The rows of several arrays as those of one, read from disk when they are used.

    Args:
        parts: arrays (n_i, ...) with equal trailing dimensions.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape = (int(self._ends[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """One row, or the rows of a slice, of indices or of a boolean mask, as an array."""
        if isinstance(key, (int, np.integer)):
            index = range(len(self))[key]
            part = int(np.searchsorted(self._ends, index, side="right"))
            # A negative index counts from the end of the part.
            return self._parts[part][index - self._ends[part]]
        rows = np.arange(len(self))[key]
        owners = np.searchsorted(self._ends, rows, side="right")
        selected = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for part in np.unique(owners):
            here = owners == part
            selected[here] = self._parts[part][rows[here] - self._ends[part]]
        return selected

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self._parts).astype(dtype or self.dtype, copy=False)


class RaggedRows:
    """Patch tokens of images of different sizes: (N_i, D) by image.

    Attributes:
        grids: (num images, 2) rows and columns of patches.
    """

    def __init__(self, tokens: np.ndarray | ShardedRows, grids: np.ndarray) -> None:
        self._tokens, self.grids = tokens, grids
        self._ends = np.cumsum(grids.prod(1, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[index]
        first = int(self._ends[index - 1]) if index else 0
        return self._tokens[first : int(self._ends[index])]


class FeatureSet(Mapping[str, Any]):
    """Features by field (``'cls'``, ``'layers.11.patches'``), a row per image in image order.

    Arrays are :class:`numpy.memmap`, or :class:`ShardedRows` over several files; patches of images
    of different sizes are :class:`RaggedRows`. ``np.asarray`` reads one into memory.

    Attributes:
        paths: images in row order.
        left_out: images without features, with reasons.
        index: everything that the run wrote down: model, statistics, options, fields.
    """

    def __init__(self, index: dict[str, Any], arrays: dict[str, Any]) -> None:
        self.index = index
        self.paths: list[str] = index["paths"]
        self.left_out: list[dict[str, str]] = index["left_out"]
        self._arrays = arrays

    def __getitem__(self, field: str) -> Any:
        if field not in self._arrays:
            raise KeyError(f"no field {field!r}; there are {', '.join(self._arrays)}")
        return self._arrays[field]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def load_features(out: str | os.PathLike) -> FeatureSet:
    """Open what ``tools/extract_features.py`` wrote: a folder, or one file.

    Parquet files are read into memory, the others are mapped.

    Raises:
        FileNotFoundError: If nothing is there, or the run has not ended.
    """
    out = Path(out).expanduser()
    index_file = out / INDEX_FILE if out.is_dir() else out.with_suffix(".json")
    if not index_file.is_file():
        raise FileNotFoundError(
            f"no features at {out}: {index_file.name} is missing; an interrupted run goes on with "
            "the same command"
        )
    index = json.loads(index_file.read_text(encoding="utf-8"))
    return FeatureSet(index, open_index(out, index))


def open_index(out: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a complete run that an index describes."""
    if out.is_dir():
        return open_shards([out / shard["file"] for shard in index["shards"]])
    if out.suffix == ".npy":
        (field,) = index["fields"]
        return {field: np.load(out, mmap_mode="r")}
    if out.suffix == ".parquet":
        return _read_parquet(out, index)
    return _with_ragged(map_tensors(out))


def open_shards(shards: Sequence[Path]) -> dict[str, Any]:
    """The fields of shards, one after the other."""
    files = [map_tensors(shard) for shard in shards]
    return _with_ragged({name: _rows([file[name] for file in files]) for name in files[0]})


def _rows(parts: list[np.ndarray]) -> np.ndarray | ShardedRows:
    return parts[0] if len(parts) == 1 else ShardedRows(parts)


def _with_ragged(arrays: dict[str, Any]) -> dict[str, Any]:
    grids = {name: a for name, a in arrays.items() if name.endswith(GRID_SUFFIX)}
    return {
        name: RaggedRows(array, np.asarray(grids[name + GRID_SUFFIX]))
        if name + GRID_SUFFIX in grids
        else array
        for name, array in arrays.items()
        if name not in grids
    }


def _read_parquet(path: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    table = import_parquet().read_table(path, memory_map=True)
    arrays = {}
    for name in table.column_names[1:]:
        column = table.column(name).combine_chunks()
        width = index["fields"].get(name, {"shape": [2]})["shape"]
        arrays[name] = column.flatten().to_numpy().reshape(-1, *width)
    return _with_ragged(arrays)
