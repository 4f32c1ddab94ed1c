"""Weights given by path, URL or hub name: where they lie on this machine."""

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import torch

from .io import atomic_write
from .model_hub import hub_folder, parse_hub_name
from .opening import open_checkpoint


def local_path(weights: str | os.PathLike) -> Path:
    """Path of local weights, after a download if they are given by URL or hub name.

    What exists on this machine comes first, then an http(s) URL, then the name of a repository on
    the Hugging Face hub (``[hf-hub:]owner/name[@revision]``, see :func:`hub_folder`).

    Downloads from a URL go to torch hub's cache (``torch.hub.get_dir()/checkpoints``) and are made
    once. A file name that ends in the beginning of the SHA-256 (``name-0123abcd.pth``) is checked
    against the content, and every file must open as a checkpoint before it enters the cache.

    Raises:
        FileNotFoundError: If the hub has no such repository, or cannot be reached.
        PermissionError: If the repository is gated and access was not granted.
        ValueError: If the download is damaged, has another hash, or is no checkpoint.
    """
    if not is_url(weights):
        path = Path(weights).expanduser()
        hub_name = None if path.exists() else parse_hub_name(weights)
        return path if hub_name is None else hub_folder(hub_name)
    url = str(weights)
    target = cache_path(url)
    if not target.exists():
        digits = _hash_prefix(target.name)
        with atomic_write(target) as partial:
            try:
                torch.hub.download_url_to_file(url, str(partial), hash_prefix=digits)
            except RuntimeError as error:
                raise ValueError(f"the download of {url} was refused: {error}") from error
            open_checkpoint(partial)
    return target


def is_url(weights: str | os.PathLike) -> bool:
    """Whether weights are given by an http(s) URL."""
    return str(weights).startswith(("http://", "https://"))


def cache_path(url: str) -> Path:
    """Where the file behind a URL is kept.

    Official files, whose names are unique, lie where torch hub puts them. Other names, such as
    ``model.safetensors``, belong to many models; they get a folder named after their address,
    which also keeps what the address says about the pretraining data.
    """
    parts = urlsplit(url)
    name = Path(parts.path).name
    if not name:
        raise ValueError(f"the URL {url} names no file")
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if _hash_prefix(name):
        return cache / name
    address = hashlib.sha256(f"{parts.netloc}{parts.path}".encode()).hexdigest()
    origin = re.sub(r"[^\w.-]+", "--", str(Path(parts.path).parent)).strip("-")
    return cache / f"{origin[-100:]}--{address[:12]}" / name


def _hash_prefix(name: str) -> str | None:
    match = re.search(r"-([0-9a-f]{8,64})\.[a-z]+$", name)
    return match[1] if match else None
