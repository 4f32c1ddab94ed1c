"""What a weight file is, opened without running anything it contains: torch, safetensors, DCP."""

import json
import os
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

# --- What every reader returns ---


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file that can be read in part.

    Attributes:
        shape: of the whole tensor.
        dtype: as stored.
        read: reads the part that a slice for every axis cuts out.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[tuple[slice, ...]], Tensor]


@dataclass(frozen=True)
class OpenedCheckpoint:
    """Names of the tensors of a checkpoint, and the means to read those that are wanted.

    Attributes:
        path: file or folder.
        container: what it is, in words.
        names: names of the tensors as stored.
        read: reads the tensors of the given names on the CPU.
        stored: every tensor as one that can be read in part; None where the container cannot.
        config: content of the ``config.json`` beside the weights, else empty.
        export: the JSON in the header of our own exports, else empty.
        notes: what was left aside on opening.
    """

    path: Path
    container: str
    names: tuple[str, ...]
    read: Callable[[Iterable[str]], dict[str, Tensor]]
    config: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    stored: Mapping[str, StoredTensor] | None = None


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object; a ``ValueError`` for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """Content of ``config.json`` in a folder, or an empty dict when there is none."""
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def first_line(error: BaseException) -> str:
    """First line of an error's message, for use inside another message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


# --- ``torch.save``, with ``weights_only=True`` and nothing less ---


# Entries that hold the weights inside a torch file, the most wanted first: the EMA model before
# the model in training.
_WEIGHT_ENTRIES = ("teacher", "model_ema", "model", "state_dict")


def open_torch_file(path: Path, *, is_zip: bool) -> OpenedCheckpoint:
    """Open a torch file that holds a state dict, bare or inside one of the known entries.

    Args:
        path: The file.
        is_zip: Whether it has the container format that torch can map into memory.

    Raises:
        ValueError: If it is damaged, holds no dict, or needs objects that could run code.
    """
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        raise ValueError(f"{path} was not loaded: {reason_of_refusal(error)}") from error
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} holds a {type(tree).__name__}; expected a dict of tensors")
    entries = [name for name in _WEIGHT_ENTRIES if _holds_tensors(tree.get(name))]
    tensors = dict(_flatten(tree[entries[0]] if entries else tree))
    return OpenedCheckpoint(
        path,
        ".pth",
        tuple(tensors),
        lambda names: {name: tensors[name] for name in names},
        notes=tuple(f"entry {name!r} ignored" for name in entries[1:]),
        # Mapped tensors touch the file where they are read.
        stored={name: _stored(tensor) for name, tensor in tensors.items()} if is_zip else None,
    )


def _stored(tensor: Tensor) -> StoredTensor:
    return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda part: tensor[part].clone())


def reason_of_refusal(error: Exception) -> str:
    """Why ``torch.load(weights_only=True)`` gave up, in words for the user."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused is not None:
        return (
            f"it holds Python objects besides tensors and plain containers ({refused[1]}); "
            "unpickling them could run code. Save the state dict alone in an environment you "
            "trust and use that file"
        )
    detail = re.search(r"WeightsUnpickler error: (.+)", str(error))
    return f"it is damaged or no file of torch.save ({detail[1] if detail else first_line(error)})"


def _holds_tensors(entry: Any) -> bool:
    return isinstance(entry, Mapping) and next(_flatten(entry), None) is not None


def _flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dicts under dotted names; anything else is passed over."""
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value.detach()
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")


# --- safetensors: one file, or an index of shards in one folder ---


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


# --- Folders of ``torch.distributed.checkpoint`` (DCP) ---
#
# Their index, ``.metadata``, is a pickle. It is read through an unpickler that knows DCP's own
# record types and nothing else, so a tampered index cannot name a function to call. The tensors
# themselves are read by torch with ``weights_only=True``; entries that are no tensors are never
# touched.


_RECORDS = (
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
)
_ADMITTED: dict[tuple[str, str], Any] = {
    **{(record.__module__, record.__qualname__): record for record in _RECORDS},
    **{
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): OrderedDict,
    # The place a checkpoint was written to; kept as text, so that it reads on any system.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib", "WindowsPath"): PureWindowsPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
    ("pathlib._local", "WindowsPath"): PureWindowsPath,
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"{module}.{name} is no part of a checkpoint index; reading it could run code"
            ) from None


class SafeReader(dcp.FileSystemReader):
    """DCP's own reader with the one step replaced that unpickles."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        index = read_index(Path(self.path))
        index.storage_meta = index.storage_meta or metadata.StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


def read_index(folder: Path) -> metadata.Metadata:
    """Read the ``.metadata`` file of a distributed checkpoint without running its content.

    Raises:
        ValueError: If it is damaged or names anything but DCP's record types, sizes and dtypes.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            index = _MetadataUnpickler(file).load()
    except Exception as error:
        raise ValueError(f"{path} was refused: {error or type(error).__name__}") from error
    if not isinstance(index, metadata.Metadata):
        raise ValueError(f"{path} holds a {type(index).__name__}; expected a checkpoint index")
    return index


def open_distributed_folder(folder: Path) -> OpenedCheckpoint:
    """Open a distributed checkpoint; its tensors are listed, its optimizer state is not.

    A checkpoint of any number of ranks is read by one process, with or without a process group.

    Raises:
        ValueError: If the index is damaged or would run code.
    """
    stored = {
        name: entry
        for name, entry in read_index(folder).state_dict_metadata.items()
        if isinstance(entry, metadata.TensorStorageMetadata) and not name.startswith("optimizer.")
    }

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        tensors = {
            name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype)
            for name in names
        }
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is")
                dcp.load(tensors, storage_reader=SafeReader(folder), no_dist=True)
        except (CheckpointException, RuntimeError, OSError, ValueError, KeyError) as error:
            raise ValueError(f"the distributed checkpoint {folder} is damaged: {error}") from error
        return tensors

    return OpenedCheckpoint(folder, "DCP folder", tuple(stored), read)


# --- Any container ---


_FOLDER_FILES = (
    (INDEX_FILE, open_index),
    ("model.safetensors", open_safetensors),
)


def open_checkpoint(path: str | os.PathLike) -> OpenedCheckpoint:
    """Open a weight file or folder; the format is told from its content, not from its suffix.

    Known are torch files (a state dict, bare or inside one of the entries 'teacher', 'model_ema',
    'model', 'state_dict'), safetensors files and their JSON index of shards, folders with
    ``config.json`` and safetensors (Hugging Face, timm), and folders written by
    ``torch.distributed.checkpoint``.

    Raises:
        FileNotFoundError: If nothing is there, or a folder lacks its weights.
        ValueError: If the content is of no known format, damaged, or would run code.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}: expected a local file or folder, an http(s) URL, or the name "
            "of a repository on the Hugging Face hub (owner/name)"
        )
    # First, because these files begin with a length, which may look like the start of any other.
    if is_safetensors(path):
        return open_safetensors(path)
    with path.open("rb") as file:
        head = file.read(64)
    is_zip = head.startswith(b"PK\x03\x04")
    if is_zip or head.startswith(b"\x80"):
        return open_torch_file(path, is_zip=is_zip)
    if head.lstrip().startswith(b"{"):
        return open_index(path)
    raise ValueError(f"{path} is no weight file: {_guess(head)}")


def _open_folder(path: Path) -> OpenedCheckpoint:
    if (path / ".metadata").is_file():
        return open_distributed_folder(path)
    for name, opener in _FOLDER_FILES:
        if (path / name).is_file():
            return opener(path / name)
    raise FileNotFoundError(
        f"no weights in the folder {path}: expected model.safetensors or its index "
        "(Hugging Face, timm), or the .metadata of a distributed checkpoint; found "
        f"{sorted(entry.name for entry in path.iterdir())[:10]}"
    )


def _guess(head: bytes) -> str:
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if head.lstrip().startswith(b"<"):
        return "it is a web page, probably the answer to a download without permission"
    return (
        f"it begins with {head[:8]!r}; expected a torch file, a safetensors file or an index of "
        "safetensors shards"
    )
