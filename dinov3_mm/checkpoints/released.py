"""The files of the released checkpoints: where they lie, and whether they are what they say."""

import hashlib
import os
from pathlib import Path

import torch

from ..models.backbones.zoo import ZOO, ZooRow, zoo_row
from .download import local_path

_CHUNK_BYTES = 2**22


def located(weights: str | os.PathLike) -> str | os.PathLike:
    """Path of the file for which a released checkpoint's name stands; anything else as it is.

    Raises:
        FileNotFoundError, ValueError: see :func:`released_file`.
    """
    row = None if Path(weights).exists() else zoo_row(os.fspath(weights))
    return weights if row is None else released_file(row)


def released_file(row: ZooRow) -> Path:
    """Local file of a released checkpoint, checked against the hash in its name.

    It is looked for in torch hub's cache (``torch.hub.get_dir()/checkpoints``), where the official
    code puts it too; files that their publisher gives to anyone are downloaded.

    Raises:
        FileNotFoundError: If it is not there and its publisher asks for a licence first.
        ValueError: If its content is not that of the released file, or nothing was released.
    """
    if row.file is None:
        raise ValueError(f"no weights of {row.official_name} were released; pass your own file")
    path = torch_hub_folder() / row.file
    if row.url is not None and not path.exists():
        path = local_path(row.url)
    if not path.exists():
        page = f" or https://huggingface.co/{row.hf_id}" if row.hf_id else ""
        raise FileNotFoundError(
            f"the weights {row.file} are not at {path}. They are gated ({row.licence}), so they "
            "are not downloaded for you: accept the licence and get the file from the publisher"
            f"{page}; then put it there, or pass its path, URL or hub name as weights"
        )
    check_released(path)
    return path


def torch_hub_folder() -> Path:
    """Where torch hub keeps weight files."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def check_released(path: Path) -> None:
    """Check that a file with the name of a released one has its content.

    Raises:
        ValueError: If the beginning of the SHA-256 differs from the digits in the name.
    """
    digits = _DIGITS.get(path.name)
    if digits is None:
        return
    found = _sha256(path)
    if not found.startswith(digits):
        raise ValueError(
            f"{path} is not the released file of that name: its SHA-256 begins with "
            f"{found[: len(digits)]} instead of {digits}. Get the file again, or rename it if you "
            "changed its content yourself"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


_DIGITS = {row.file: row.sha256_prefix for row in ZOO.values() if row.file and row.sha256_prefix}
