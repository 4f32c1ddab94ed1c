"""Opening of weight files of every container format, without running anything they contain."""

import os
from pathlib import Path

from .distributed_folder import open_distributed_folder
from .safetensors_file import INDEX_FILE, is_safetensors, open_index, open_safetensors
from .source import OpenedCheckpoint
from .torch_file import open_torch_file

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
