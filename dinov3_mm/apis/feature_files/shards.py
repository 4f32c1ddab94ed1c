"""One shard: rows of features gathered in any order, written as one safetensors file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from dinov3_mm.checkpoints import atomic_write

from .mapped import read_metadata

HEADER_KEY = "dinov3_mm_features"
GRID_SUFFIX = ".grid"


class ShardBuffer:
    """Rows and failures of the images of one shard.

    Args:
        indices: the images.
    """

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = indices
        self.left_out: dict[int, str] = {}
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


def write_shard(path: Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Write a shard; it appears complete or not at all."""
    metadata = {"format": "np", HEADER_KEY: json.dumps(header)}
    with atomic_write(path) as partial:
        save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, partial, metadata)


def read_shard_header(path: Path) -> dict[str, Any]:
    """What a shard says about itself: ``key``, ``paths`` in row order, ``left_out``."""
    return json.loads(read_metadata(path)[HEADER_KEY])
