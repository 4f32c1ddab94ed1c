"""Features on disk: the state of image files, shards, one merged file, and their reading."""

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinov3_mm.checkpoints import atomic_write

# --- Are the image files still those ---


# Asking a network disk about a file takes a millisecond of waiting.
_THREADS = 16
_BLOCK = 2**20


class FileState(NamedTuple):
    """What is known of a file without reading an image.

    Attributes:
        size: bytes.
        modified: time of the last modification, in ns.
        content: SHA-256 of the bytes, where it was asked for.
    """

    size: int
    modified: int
    content: str | None = None


def file_states(paths: Sequence[str], *, content: bool = False) -> list[FileState | None]:
    """The states of files, of links those of what they point to; None where there is no file.

    Args:
        paths: the files.
        content: hash the bytes too. A copy or a synchronisation that restores the time of a file of
            the same size is noticed by nothing else.
    """

    def state(path: str) -> FileState | None:
        try:
            found = os.stat(path)
            digest = _content(path) if content else None
        except (OSError, ValueError):
            return None
        return FileState(found.st_size, found.st_mtime_ns, digest)

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(state, paths, chunksize=256))


def is_same(there: Sequence | None, now: FileState | None) -> bool:
    """Whether a file is the one whose state was written down.

    Where both hashes are known they decide; where one is asked for and was not written down, the
    file may be another.
    """
    if there is None or now is None:
        return there is now
    size, modified, content = there
    if now.content is not None:
        return content == now.content
    return (size, modified) == (now.size, now.modified)


def some(names: Iterable[str], shown: int = 3) -> str:
    """A few names for a message, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _content(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


# --- A shard: safetensors, written whole and read in place ---


HEADER_KEY = "dinov3_mm_features"
GRID_SUFFIX = ".grid"
SHARD_BYTES = 256 * 2**20  # files of a size that reads and copies well

# NumPy has no bfloat16: such values come as their 16 bits.
_DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items() if name != "BF16"}
_LENGTH_BYTES = 8

Spec = tuple[tuple[int, ...], np.dtype]  # shape and dtype


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, read-only, read from disk when they are used."""
    header, start = _read_header(path)
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        spec = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
        arrays[name] = _map(path, start + entry["data_offsets"][0], *spec, mode="r")
    return arrays


def create_tensors(
    path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Make a safetensors file of zeros and return its tensors, to be written to in place."""
    header: dict = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (shape, dtype) in specs.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % _LENGTH_BYTES)
    start = _LENGTH_BYTES + len(encoded)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded)
        file.truncate(start + offset)
    return {
        name: _map(path, start + header[name]["data_offsets"][0], *spec, mode="r+")
        for name, spec in specs.items()
    }


def read_metadata(path: Path) -> dict[str, str]:
    """Strings in the header of a safetensors file."""
    return _read_header(path)[0].get("__metadata__", {})


def _read_header(path: Path) -> tuple[dict, int]:
    """The header, and the place of the first byte after it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path} is no safetensors file, or truncated")
        return json.loads(file.read(length)), _LENGTH_BYTES + length


def _map(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, mode: str):
    if not math.prod(shape):  # nothing can be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode, offset, shape)


class ShardBuffer:
    """Rows and failures of the images of one shard.

    Args:
        indices: the images.

    Attributes:
        left_out: reasons of the images without features.
        states: of the files before they were read.
    """

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = indices
        self.left_out: dict[int, str] = {}
        self.states: dict[int, FileState | None] = {}
        self._rows: dict[int, tuple[Mapping[str, np.ndarray], int]] = {}

    def add(self, indices: Sequence[int], fields: Mapping[str, np.ndarray]) -> None:
        """Add the features of some images, (B, ...) by field."""
        for row, index in enumerate(indices):
            self._rows[index] = fields, row

    def leave_out(self, index: int, reason: str) -> None:
        """Note an image without features."""
        self.left_out[index] = reason

    @property
    def is_complete(self) -> bool:
        """Whether every image has been dealt with."""
        return len(self._rows) + len(self.left_out) == len(self.indices)

    @property
    def kept(self) -> list[int]:
        """Images with features, in order."""
        return sorted(self._rows)

    def arrays(self, empty: Mapping[str, np.ndarray], ragged: Sequence[str]) -> dict:
        """Arrays of the shard by field.

        Args:
            empty: arrays without rows, for the shapes and dtypes when no image could be read.
            ragged: fields with a row per patch instead of a row per image.
        """
        arrays = {}
        for name, none in empty.items():
            rows = [self._rows[index][0][name][self._rows[index][1]] for index in self.kept]
            if not rows:
                arrays[name] = none
            else:
                arrays[name] = np.concatenate(rows) if name in ragged else np.stack(rows)
        return arrays


def write_shard(
    path: Path, arrays: Mapping[str, np.ndarray | Tensor], header: Mapping[str, Any]
) -> None:
    """Write a shard; it appears complete or not at all."""
    metadata = {"format": "np", HEADER_KEY: json.dumps(header)}
    tensors = {name: torch.as_tensor(array).contiguous() for name, array in arrays.items()}
    with atomic_write(path) as partial:
        save_file(tensors, partial, metadata)


def read_shard_header(path: Path) -> dict[str, Any]:
    """What a shard says about itself: ``key``, ``paths`` in row order with the states of their
    ``files``, ``left_out``."""
    return json.loads(read_metadata(path)[HEADER_KEY])


# --- Shards to one file ---


Shards = Sequence[Path]


def merge_shards(shards: Shards, path: Path, suffix: str) -> None:
    """Write the rows of all shards, in order, into one file at ``path``.

    Args:
        shards: shard files in order.
        path: where to write.
        suffix: format, one of :data:`FILE_SUFFIXES`.
    """
    FILE_SUFFIXES[suffix](shards, path)


def check_format(suffix: str, fields: Sequence[str], ragged: Sequence[str]) -> None:
    """Raise early if one file of this format cannot hold the fields.

    Raises:
        ImportError: If the format needs a package that is not installed.
        ValueError: If the format is unknown or too simple.
    """
    if suffix not in FILE_SUFFIXES:
        raise ValueError(
            f"unknown output format {suffix!r}; expected a name that ends in "
            f"{', '.join(FILE_SUFFIXES)}, or the name of a folder without a suffix"
        )
    if suffix == ".parquet":
        import_parquet()
    if suffix == ".npy" and len(fields) > 1:
        raise ValueError(
            f"an .npy file holds one array, {', '.join(fields)} were asked for; choose one, or "
            "write .safetensors, .parquet or a folder"
        )
    if suffix == ".npy" and ragged:
        raise ValueError(
            "an .npy file cannot hold the patches of images of different sizes; write "
            ".safetensors, .parquet or a folder, or give an image_size"
        )


def import_parquet() -> ModuleType:
    """``pyarrow.parquet``; ImportError with the extra to install if it is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError(
            "Parquet files need pyarrow: install the extra, pip install 'dinov3_mm[data]', or "
            "write .safetensors or .npy"
        )
    import pyarrow.parquet

    return pyarrow.parquet


def _merge_safetensors(shards: Shards, path: Path) -> None:
    specs: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for shard in shards:
        for name, array in map_tensors(shard).items():
            rows = specs[name][0][0] if name in specs else 0
            specs[name] = (rows + len(array), *array.shape[1:]), array.dtype
    _fill(create_tensors(path, specs, {"format": "np"}), shards)


def _merge_npy(shards: Shards, path: Path) -> None:
    parts = [map_tensors(shard) for shard in shards]
    (name,) = parts[0]
    shape = (sum(len(part[name]) for part in parts), *parts[0][name].shape[1:])
    # open_memmap would append .npy to the name of a file that is still partial.
    with path.open("wb") as file:
        array = np.lib.format.header_data_from_array_1_0(parts[0][name])
        np.lib.format.write_array_header_2_0(file, {**array, "shape": shape})
        for part in parts:
            part[name].tofile(file)


def _fill(targets: Mapping[str, np.ndarray], shards: Shards) -> None:
    done = dict.fromkeys(targets, 0)
    for shard in shards:
        for name, array in map_tensors(shard).items():
            targets[name][done[name] : done[name] + len(array)] = array
            done[name] += len(array)
    for target in targets.values():
        if isinstance(target, np.memmap):
            target.flush()


def _merge_parquet(shards: Shards, path: Path) -> None:
    parquet = import_parquet()
    writer = None
    for shard in shards:
        table = _table(map_tensors(shard), read_shard_header(shard)["paths"])
        if writer is None:
            writer = parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def _table(arrays: Mapping[str, np.ndarray], paths: Sequence[str]) -> Any:
    """A row per image: its path, and each field as a list of numbers (patches row by row)."""
    import pyarrow as pa

    columns: dict[str, Any] = {"path": pa.array(paths, pa.string())}
    for name, array in arrays.items():
        grids = arrays.get(name + GRID_SUFFIX)
        if grids is None:
            size = int(np.prod(array.shape[1:]))
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), size)
        else:
            ends = np.cumsum(grids.prod(1, dtype=np.int64) * array.shape[1])
            offsets = pa.array(np.concatenate([[0], ends]), pa.int64())
            columns[name] = pa.LargeListArray.from_arrays(offsets, pa.array(array.reshape(-1)))
    return pa.table(columns)


FILE_SUFFIXES: dict[str, Callable[[Shards, Path], None]] = {
    ".safetensors": _merge_safetensors,
    ".npy": _merge_npy,
    ".parquet": _merge_parquet,
}


# --- Reading ---


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
