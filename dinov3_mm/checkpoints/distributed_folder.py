"""Reading of checkpoint folders written by ``torch.distributed.checkpoint`` (DCP).

Their index, ``.metadata``, is a pickle. It is read through an unpickler that knows DCP's own record
types and nothing else, so a tampered index cannot name a function to call. The tensors themselves
are read by torch with ``weights_only=True``; entries that are no tensors are never touched.
"""

import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

from .source import OpenedCheckpoint

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
