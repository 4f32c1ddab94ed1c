"""Reading of safetensors: one file, or an index of shards in one folder."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .source import OpenedCheckpoint, StoredTensor, first_line, read_config, read_json

EXPORT_KEY = "dinov3_mm"
FORMAT_VERSION = 1
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def is_safetensors(path: Path) -> bool:
    """Whether a file begins like safetensors: eight bytes of length, then a JSON object."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def open_safetensors(path: Path) -> OpenedCheckpoint:
    """Open one safetensors file; a ``config.json`` beside it is read too.

    Raises:
        ValueError: If the file is truncated or damaged.
    """
    with _opened(path) as file:
        location = dict.fromkeys(file.keys(), path)
        export = _export_of(file.metadata(), path)
    # An export says all about itself; a config.json beside it belongs to something else.
    config = {} if export else read_config(path.parent)
    return _checkpoint(path, ".safetensors", location, config, export)


def open_index(path: Path) -> OpenedCheckpoint:
    """Open the shards that a ``*.safetensors.index.json`` lists.

    Raises:
        FileNotFoundError: If a shard is missing.
        ValueError: If the index or a shard is damaged, or they do not agree.
    """
    index = read_json(path)
    shard_of = index.get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(
            f"{path} is no index of safetensors shards: it has no 'weight_map'. Pass the weight "
            "file, or the folder that holds it"
        )
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{path} points to {shard!r}; a shard must lie in the same folder")
        if not (path.parent / shard).is_file():
            raise FileNotFoundError(f"{path} names the shard {shard}, which is missing")
        with _opened(path.parent / shard) as file:
            present = set(file.keys())
        absent = [
            name for name, place in shard_of.items() if place == shard and name not in present
        ]
        if absent:
            raise ValueError(f"{shard} lacks tensors that {path} promises: {absent[:5]}")
    location = {name: path.parent / shard for name, shard in shard_of.items()}
    container = f"{len(set(shard_of.values()))} safetensors shards"
    export = _export_of(index.get("metadata"), path)
    config = {} if export else read_config(path.parent)
    return _checkpoint(path, container, location, config, export)


def read_export_header(path: Path) -> dict[str, Any]:
    """JSON that our exports carry in their safetensors header, or in the index of their folder.

    Empty for any other file or folder, and where there is none.

    Raises:
        ValueError: If the file is truncated or damaged, or from a later version of this project.
    """
    if path.is_dir():
        path = path / INDEX_FILE
    if not path.is_file():
        return {}
    if path.name.endswith(".index.json"):
        return _export_of(read_json(path).get("metadata"), path)
    if not is_safetensors(path):
        return {}
    with _opened(path) as file:
        return _export_of(file.metadata(), path)


def _export_of(metadata: Any, path: Path) -> dict[str, Any]:
    stated = metadata.get(EXPORT_KEY, "{}") if isinstance(metadata, dict) else "{}"
    try:
        header = json.loads(stated)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its entry {EXPORT_KEY!r} is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its entry {EXPORT_KEY!r} is no JSON object")
    if header.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {header['format_version']}; this version of dinov3_mm "
            f"reads up to {FORMAT_VERSION}, install a later one"
        )
    return header


def _checkpoint(
    path: Path,
    container: str,
    location: dict[str, Path],
    config: dict[str, Any],
    export: dict[str, Any],
) -> OpenedCheckpoint:
    read, stored = _reader(location), _StoredTensors(location)
    return OpenedCheckpoint(path, container, tuple(location), read, config, export, stored=stored)


class _StoredTensors(Mapping[str, StoredTensor]):
    """Tensors that can be read in part; a file is opened when one of its tensors is asked for."""

    def __init__(self, location: dict[str, Path]) -> None:
        self._location = location

    def __len__(self) -> int:
        return len(self._location)

    def __iter__(self) -> Iterator[str]:
        return iter(self._location)

    def __getitem__(self, name: str) -> StoredTensor:
        path = self._location[name]
        with _opened(path) as file:
            found = file.get_slice(name)
            shape, dtype = tuple(found.get_shape()), _DTYPES[found.get_dtype()]

        def read(part: tuple[slice, ...]) -> Tensor:
            with _opened(path) as file:
                # A scalar has no axis to cut.
                return file.get_slice(name)[part] if part else file.get_tensor(name)

        return StoredTensor(shape, dtype, read)


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: {first_line(error)}") from error


def _reader(location: dict[str, Path]):
    def read(names: Iterable[str]) -> dict[str, Tensor]:
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(location[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, stored_here in wanted.items():
            with _opened(path) as file:
                tensors.update({name: file.get_tensor(name) for name in stored_here})
        return tensors

    return read
