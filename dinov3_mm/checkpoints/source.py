"""What every reader of a container format returns, and small helpers that they share."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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
