"""Shards to one file, a shard at a time."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .shards import GRID_SUFFIX, create_tensors, map_tensors, read_shard_header

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
