"""Reading of files written by ``torch.save``, with ``weights_only=True`` and nothing less."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .source import OpenedCheckpoint, StoredTensor, first_line

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
