"""Safetensors as memory-mapped arrays, for files that are larger than the memory."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I32": np.dtype("<i4")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
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
