"""The files of a feature cache: shards as those of ``extract_features``, with a row a call.

A shard holds, of each of its samples (an image and a view of it), what the backbone gave in every
call: one in training, one a window or a mirror image in validation. Its header names the images and
the state of their files. Later shards take precedence: an image that has changed gets a row in a
new shard, and a shard that nothing refers to any more is deleted.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov3_mm.errors import ConfigError
from dinov3_mm.features.store import FileState, map_tensors, read_shard_header, write_shard

_OPEN_SHARDS = 64
_STORED = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The shape of each row, beside a field whose rows are of several shapes and lie flat.
_SHAPE = ".shape"


class Place(NamedTuple):
    """Where a sample lies, and what its file was.

    Attributes:
        shard: number of the shard.
        row: of the sample in it; -1 for an image that could not be read.
        state: of the file; None for what is no file.
        reason: why the image could not be read.
    """

    shard: int
    row: int
    state: Sequence | None
    reason: str | None = None


@dataclass
class Call:
    """What the frozen part of a model gave for an image in one call.

    Attributes:
        outputs: tensors without the dimension of the batch, in tuples as the module nests them.
        size: height and width of the input.
    """

    outputs: Any
    size: tuple[int, int]


@dataclass
class Sample:
    """An image in one view.

    Attributes:
        calls: in the order of the model.
        original: height, width and EXIF orientation of the image as it was loaded.
        stamp: see :func:`~dinov3_mm.engine.feature_cache.views.stamp`.
    """

    calls: list[Call]
    original: tuple[int, int, int]
    stamp: int


@dataclass
class Batch:
    """Samples that will become a shard, and images without features."""

    keys: list[tuple[str, str]] = field(default_factory=list)
    states: list[FileState | None] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    num_bytes: int = 0

    def add(self, key: tuple[str, str], state: FileState | None, sample: Sample) -> None:
        """Take a sample."""
        self.keys.append(key)
        self.states.append(state)
        self.samples.append(sample)
        self.num_bytes += size_of(sample)

    def leave_out(self, key: tuple[str, str], state: FileState | None, reason: str) -> None:
        """Note an image that cannot be read."""
        path, view = key
        self.left_out.append({"path": path, "view": view, "file": state, "reason": reason})


def size_of(sample: Sample) -> int:
    """Bytes of the features of a sample."""
    leaves = [leaf for call in sample.calls for leaf in flatten(call.outputs)[0]]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


class FeatureStore:
    """Samples of a cache by image and view.

    Args:
        folder: of a cache; shards may still come.
        key: hash of what all features were made from; shards of another one are refused. None takes
            any.

    Raises:
        ConfigError: a shard of something else.
    """

    def __init__(self, folder: str | Path, key: str | None = None) -> None:
        self.folder = Path(folder)
        self.key = key
        self.places: dict[tuple[str, str], Place] = {}
        self.next_shard = 0
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        for path in sorted(self.folder.glob("features-*.safetensors")):
            self._read_header(path)

    def _read_header(self, path: Path) -> None:
        header = read_shard_header(path)
        if self.key is not None and header["key"] != self.key:
            raise ConfigError(
                f"feature cache: {path} was made from something else; remove it, or give another "
                "folder"
            )
        number = int(path.stem.split("-")[1])
        self.next_shard = number + 1
        rows = zip(header["paths"], header["views"], header["files"], strict=True)
        for row, (name, view, state) in enumerate(rows):
            self.places[name, view] = Place(number, row, state)
        for entry in header["left_out"]:
            place = Place(number, -1, entry["file"], entry["reason"])
            self.places[entry["path"], entry["view"]] = place

    def __getstate__(self) -> dict[str, Any]:
        # Every worker process opens the files for itself.
        return {**self.__dict__, "_shards": OrderedDict()}

    def path(self, number: int) -> Path:
        """File of the shard with a number."""
        return self.folder / f"features-{number:06d}.safetensors"

    def write(self, number: int, batch: Batch, dtype: str) -> None:
        """Write a shard; the file appears when it is complete."""
        header = {
            "key": self.key,
            "dtype": dtype,
            "paths": [path for path, _ in batch.keys],
            "views": [view for _, view in batch.keys],
            "files": batch.states,
            "left_out": batch.left_out,
        }
        calls = [call for sample in batch.samples for call in sample.calls]
        arrays: dict[str, Tensor] = {}
        if calls:
            parts = [flatten(call.outputs) for call in calls]
            header["structure"] = parts[0][1]
            arrays = {
                "calls": torch.tensor([len(s.calls) for s in batch.samples], dtype=torch.int32),
                "original": torch.tensor([s.original for s in batch.samples], dtype=torch.int32),
                "stamp": torch.tensor([s.stamp for s in batch.samples], dtype=torch.int32),
                "size": torch.tensor([call.size for call in calls], dtype=torch.int32),
            }
            for name, rows in enumerate(zip(*(leaves for leaves, _ in parts), strict=True)):
                arrays.update(_packed(str(name), [row.to(_STORED[dtype]) for row in rows]))
        write_shard(self.path(number), arrays, header)

    def read(self, place: Place) -> Sample:
        """The sample at a place."""
        if place.shard not in self._shards:
            if len(self._shards) == _OPEN_SHARDS:
                self._shards.popitem(last=False)
            self._shards[place.shard] = _Shard(self.path(place.shard))
        self._shards.move_to_end(place.shard)
        return self._shards[place.shard].sample(place.row)

    def delete_unused(self) -> None:
        """Delete shards whose samples all have a newer row."""
        used = {place.shard for place in self.places.values()}
        for path in self.folder.glob("features-*.safetensors"):
            if int(path.stem.split("-")[1]) not in used:
                path.unlink()


class _Shard:
    def __init__(self, path: Path) -> None:
        header = read_shard_header(path)
        self.is_bf16 = header["dtype"] == "bf16"
        self.structure = header["structure"]
        self.arrays = map_tensors(path)
        self.ends = np.cumsum(self.arrays["calls"])
        self.starts = {
            name: np.cumsum([0, *shapes.prod(1, dtype=np.int64)])
            for name, shapes in self.arrays.items()
            if name.endswith(_SHAPE)
        }

    def sample(self, row: int) -> Sample:
        end = int(self.ends[row])
        calls = [self._call(number) for number in range(end - int(self.arrays["calls"][row]), end)]
        original = tuple(int(value) for value in self.arrays["original"][row])
        return Sample(calls, original, int(self.arrays["stamp"][row]))

    def _call(self, number: int) -> Call:
        height, width = self.arrays["size"][number]
        leaves = lambda name: self._leaf(str(name), number)  # noqa: E731
        return Call(_nest(self.structure, leaves), (int(height), int(width)))

    def _leaf(self, name: str, number: int) -> Tensor:
        shapes = self.arrays.get(name + _SHAPE)
        if shapes is None:
            row = self.arrays[name][number]
        else:
            start, stop = self.starts[name + _SHAPE][number : number + 2]
            row = self.arrays[name][start:stop].reshape(shapes[number])
        tensor = torch.from_numpy(np.array(row))  # a copy: what is mapped cannot be written to
        return tensor.view(torch.bfloat16) if self.is_bf16 else tensor


def flatten(outputs: Any) -> tuple[list[Tensor], Any]:
    """Tensors in nested tuples or lists, and where each stands, as JSON."""
    if isinstance(outputs, Tensor):
        return [outputs], 0
    if not isinstance(outputs, (tuple, list)):
        raise ConfigError(
            f"feature cache: the backbone gives a {type(outputs).__name__}; expected tensors in "
            "tuples"
        )
    leaves: list[Tensor] = []
    structure = []
    for part in outputs:
        inner, where = flatten(part)
        structure.append(_shifted(where, len(leaves)))
        leaves += inner
    return leaves, structure


def map_outputs(change: Any, *outputs: Any) -> Any:
    """Apply a function to tensors at the same place of several nested outputs."""
    if isinstance(outputs[0], Tensor):
        return change(*outputs)
    return tuple(map_outputs(change, *parts) for parts in zip(*outputs, strict=True))


def origin_key(origin: Mapping) -> str:
    """Hash of what all features of a cache were made from."""
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:16]


def _shifted(where: Any, by: int) -> Any:
    return where + by if isinstance(where, int) else [_shifted(part, by) for part in where]


def _nest(structure: Any, leaf: Any) -> Any:
    if isinstance(structure, int):
        return leaf(structure)
    return tuple(_nest(part, leaf) for part in structure)


def _packed(name: str, rows: list[Tensor]) -> dict[str, Tensor]:
    if all(row.shape == rows[0].shape for row in rows):
        return {name: torch.stack(rows)}
    shapes = torch.tensor([row.shape for row in rows], dtype=torch.int32)
    return {name: torch.cat([row.reshape(-1) for row in rows]), name + _SHAPE: shapes}
