"""One shard: rows of features as a safetensors file, written whole and read in place."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinov3_mm.checkpoints import atomic_write

from .files import FileState

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
