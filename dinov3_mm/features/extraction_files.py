"""What an extraction writes, into which files, and which rows of an earlier one it keeps."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3_mm.checkpoints import atomic_write
from dinov3_mm.errors import hint

from .store import (
    GRID_SUFFIX,
    INDEX_FILE,
    FileState,
    RaggedRows,
    file_states,
    is_same,
    open_index,
    open_shards,
    read_shard_header,
    some,
)
from .tokens import FIELDS, ImageFeatures, Tokens

STORE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class FieldSelection:
    """Which tokens are stored, and under which names.

    The tokens of the last block have plain names (``'cls'``), those of other blocks carry its index
    (``'layers.5.cls'``).

    Args:
        what: any of 'cls', 'registers', 'patches', 'pooled' (mean patch).
        layers: further blocks.
        store_dtype: 'fp32' or 'fp16'.
        ragged: images have different sizes: patches are stored as one row per patch, with the rows
            and columns of each image under ``'patches.grid'``.

    Raises:
        ValueError: If a field or the dtype is unknown, or there is no field.
    """

    def __init__(
        self, what: Sequence[str], layers: Sequence[int], *, store_dtype: str, ragged: bool
    ) -> None:
        if store_dtype not in STORE_DTYPES:
            raise ValueError(
                f"unknown store_dtype {store_dtype!r}; {hint(str(store_dtype), STORE_DTYPES)}"
            )
        unknown = next((field for field in what if field not in FIELDS), None)
        if unknown is not None or not what:
            raise ValueError(f"cannot extract {unknown!r}; {hint(str(unknown), FIELDS)}")
        self._what = [field for field in FIELDS if field in what]
        self._sources = {"": None, **{f"layers.{index}.": index for index in layers}}
        self._dtype, self._ragged = STORE_DTYPES[store_dtype], ragged
        self.names = [prefix + field for prefix in self._sources for field in self._what]
        self.ragged = [name for name in self.names if ragged and name.endswith("patches")]

    def select(self, features: ImageFeatures) -> dict[str, np.ndarray]:
        """The stored arrays (B, ...) of features on any device."""
        arrays = {}
        for prefix, layer in self._sources.items():
            tokens = features if layer is None else features.layers[layer]
            for part in self._what:
                arrays[prefix + part] = self._store(getattr(tokens, part))
            if prefix + "patches" in self.ragged:
                arrays[prefix + "patches" + GRID_SUFFIX] = np.array(tokens.grids, np.int32)
        return arrays

    def describe(self, features: ImageFeatures) -> dict[str, dict]:
        """Shape of a row of each field, and the grid of patches where all images share it."""
        fields = {}
        for prefix, layer in self._sources.items():
            tokens: Tokens = features if layer is None else features.layers[layer]
            for part in self._what:
                name = prefix + part
                shape = list(getattr(tokens, part).shape[1:])
                fields[name] = {"shape": shape[-1:] if name in self.ragged else shape}
                if part == "patches" and not self._ragged:
                    fields[name]["grid"] = list(tokens.grid)
        return fields

    def empty(self, features: ImageFeatures) -> dict[str, np.ndarray]:
        """Arrays without rows, of the shapes and dtypes that shards have."""
        return {
            name: array[:0, 0] if name in self.ragged else array[:0]
            for name, array in self.select(features).items()
        }

    def _store(self, tensor: Tensor) -> np.ndarray:
        # A copy: a view of the CLS token would keep the patch tokens in memory.
        return tensor.to("cpu", self._dtype, copy=True).contiguous().numpy()


# --- What a run extracts and how it is cut into shards ---


PLAN_FILE = "plan.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ExtractionPlan:
    """Shards of one run.

    Attributes:
        settings: everything that decides the values: model, statistics, options, fields, images.
        num_images: images of the source.
        shard_size: images per shard; the last one may have fewer.
    """

    settings: dict[str, Any]
    num_images: int
    shard_size: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_size)

    @property
    def key(self) -> str:
        """Hash of the settings; shards carry it."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    def shard_file(self, shard: int) -> str:
        """File name of a shard."""
        return f"features-{shard:05d}-of-{self.num_shards:05d}.safetensors"

    def images_of(self, shard: int) -> range:
        """Image indices of a shard."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.num_images))

    def save(self, folder: Path) -> None:
        """Write the plan into the folder of the shards."""
        record = {"format_version": FORMAT_VERSION, **vars(self)}
        with atomic_write(folder / PLAN_FILE) as partial:
            partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "ExtractionPlan | None":
        """The plan in a folder, None if there is none."""
        if not (folder / PLAN_FILE).is_file():
            return None
        record = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
        return cls(record["settings"], record["num_images"], record["shard_size"])


def check_same(found: dict[str, Any], asked: dict[str, Any], out: Path) -> None:
    """Raise ValueError if settings on disk are not those asked for, naming what differs."""
    differences = _differences(found, asked)
    if differences:
        advice = ""
        if found.get("dtype") != asked.get("dtype"):  # the same command may choose another one
            advice = f"; --dtype {found.get('dtype')} computes as there, whatever the device"
        raise ValueError(
            f"{out} holds features of another run: {'; '.join(differences)}. Choose another --out, "
            f"repeat the earlier options, or delete it{advice}"
        )


def hash_paths(paths: Sequence[str]) -> str:
    """Hash of the names and the order of images."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()[:16]


def _differences(found: Any, asked: Any, name: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(asked, dict):
        return [
            difference
            for key in {**found, **asked}
            for difference in _differences(
                found.get(key), asked.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if found == asked else [f"{name} {found} there, {asked} asked for"]


# --- What an earlier run has left ---


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
