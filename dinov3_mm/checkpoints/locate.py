"""From a path, URL, hub name or released name to a file here, and what is known of it: its
hash, its input statistics.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch

from dinov3_mm.errors import hint
from dinov3_mm.models.backbones.zoo import ZOO, ZooRow, zoo_row

from .containers import open_checkpoint, read_config, read_export_header, read_json
from .io import atomic_write

# --- Weights given by the name of a repository on the Hugging Face hub ---


# Weights that cannot run code, and what belongs to them; never pickles.
_FETCHED = (
    "config.json",
    "preprocessor_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
_PREFIX = "hf-hub:"
_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[A-Za-z0-9][\w./-]*))?"
)
_FILE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".json")


class HubName(NamedTuple):
    """A repository on the hub.

    Attributes:
        repo: ``owner/name``.
        revision: branch, tag or commit; None for the default branch.
    """

    repo: str
    revision: str | None


def parse_hub_name(weights: str | os.PathLike) -> HubName | None:
    """Read ``[hf-hub:]owner/name[@revision]``; None for anything else.

    A path object, and a name that ends like a weight file, is never a repository.
    """
    if not isinstance(weights, str):
        return None
    match = _NAME.fullmatch(weights.removeprefix(_PREFIX))
    is_file = not weights.startswith(_PREFIX) and weights.endswith(_FILE_SUFFIXES)
    return HubName(match["repo"], match["revision"]) if match and not is_file else None


def hub_folder(name: HubName) -> Path:
    """Local folder of a repository: that of the hub's cache, after a download if it is not there.

    Cache, token, endpoint and offline mode are those of ``huggingface_hub`` (``HF_HOME``,
    ``hf auth login``, ``HF_HUB_OFFLINE``). What is cached completely is used without a look at the
    network; only configurations and safetensors are ever fetched.

    Raises:
        ImportError: If huggingface_hub is not installed.
        FileNotFoundError: If there is no such repository, it holds no safetensors, or the hub
            cannot be reached.
        PermissionError: If the repository is gated and access was not granted.
    """
    given = name.repo + (f"@{name.revision}" if name.revision else "")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"there is no local file or folder {given}; to take it from the Hugging Face hub, "
            "install huggingface_hub (pip install huggingface_hub)"
        ) from error
    wanted = {"repo_id": name.repo, "revision": name.revision, "allow_patterns": list(_FETCHED)}
    wanted["ignore_patterns"] = ["*/*"]
    try:
        folder = Path(snapshot_download(**wanted, local_files_only=True))
        open_checkpoint(folder)
    except FileNotFoundError:  # nothing or not all of it is cached
        try:
            folder = Path(snapshot_download(**wanted))
        except HfHubHTTPError as error:
            raise _refused(name.repo, given, error) from error
        except LocalEntryNotFoundError as error:
            raise FileNotFoundError(
                f"there is no local file or folder {given}; the hub repository of that name is not "
                f"in the cache, and the hub cannot be reached ({_first_sentence(error)}). Unset "
                "HF_HUB_OFFLINE if it is set, or give the path of the downloaded files"
            ) from error
    return folder


def _refused(repo: str, given: str, error: OSError) -> OSError:
    """The error to raise for an answer of the hub that is no file."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"the hub repository {repo} has no such revision: {given}")
    status = getattr(error.response, "status_code", None)
    if isinstance(error, GatedRepoError) or (
        status == 403 and not isinstance(error, RepositoryNotFoundError)
    ):
        return PermissionError(
            f"the hub repository {repo} is gated: accept its licence on "
            f"https://huggingface.co/{repo} and log in with `hf auth login`, or give the path of a "
            "file that you have"
        )
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"{given} is neither a local file or folder nor a repository of the Hugging Face hub "
            "that you can see; a private one needs `hf auth login`"
        )
    return ConnectionError(
        f"the Hugging Face hub did not deliver {given}: {_first_sentence(error)}"
    )


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0]


# --- Weights given by path, URL or hub name: where they lie on this machine ---


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


# --- The files of the released checkpoints: where they lie, and whether they are what they say ---


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


# --- Which input normalisation a weight file was trained with ---


class Statistics(NamedTuple):
    """Mean and standard deviation of images in [0, 1].

    Attributes:
        mean: per channel; red, green, blue for the released models.
        std: per channel.
        name: of the pretraining data, 'LVD-1689M' or 'SAT-493M', or 'custom'.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str = "custom"


# By the tag that official, Hugging Face and timm names have in common, e.g. 'lvd1689m'.
_BY_TAG = {
    row.data.replace("-", "").lower(): Statistics(row.mean, row.std, row.data)
    for row in ZOO.values()
    if row.data
}


# Names without such a tag: 'dinov2_vits14' of official files, 'dinov2-small' of Hugging Face.
_BY_NAME = {
    name: Statistics(row.mean, row.std, row.data)
    for row in ZOO.values()
    if row.data and row.backbone == "DINOv2ViT"
    for name in (row.official_name, row.hf_id.rpartition("/")[2])
}


def statistics_of_data(name: str) -> Statistics:
    """Statistics of the released models by the name of their pretraining data.

    Raises:
        ValueError: If no released model was trained on such data.
    """
    known = {statistics.name: statistics for statistics in _BY_TAG.values()}
    if name not in known:
        raise ValueError(f"no released model was trained on {name!r}; {hint(str(name), known)}")
    return known[name]


def named_statistics(mean: Any, std: Any, backbone: str | None = None) -> Statistics:
    """Statistics with the name of the first data of the zoo that has these values.

    Args:
        mean, std: the values.
        backbone: class name in the MODELS registry; its own data come first.
    """
    mean, std = tuple(float(m) for m in mean), tuple(float(s) for s in std)
    rows = [row for row in ZOO.values() if row.data and (row.mean, row.std) == (mean, std)]
    own = [row for row in rows if row.backbone == backbone]
    return Statistics(mean, std, (own or rows)[0].data) if rows else Statistics(mean, std)


def read_statistics(path: str | os.PathLike) -> Statistics:
    """Input normalisation that belongs to a weight file, folder or URL; no tensor is read.

    Our exports state it. For other files the data tag in the name of the file or of its folders
    decides ('lvd1689m', 'sat493m'; DINOv2 files are known by the name of the model), then the
    preprocessor or model configuration beside it.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If neither the file nor its name states it.
    """
    path = local_path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}")
    statistics = find_statistics(path)
    if statistics is None:
        raise ValueError(
            f"{path} does not state its input normalisation: it is no export of dinov3_mm, no name "
            f"on its path contains {' or '.join(_BY_TAG)}, and no configuration lies beside it. "
            "Pass mean and std yourself"
        )
    return statistics


def find_statistics(path: Path) -> Statistics | None:
    """As :func:`read_statistics`, but None where nothing states the normalisation."""
    header = read_export_header(path)
    stated = header.get("statistics")
    if stated is not None:
        return named_statistics(stated["mean"], stated["std"], header.get("backbone"))
    found = _tagged(path) or _configured(path if path.is_dir() else path.parent)
    channels = header.get("arch", {}).get("in_channels")
    # An export for other channels may keep the name of the RGB weights that it came from.
    return found if found and channels in (None, len(found.mean)) else None


def _tagged(path: Path) -> Statistics | None:
    # Three levels reach the model's name in the folders of a hub cache
    # (models--facebook--dinov3-.../snapshots/<revision>/model.safetensors).
    names = [path.name, *(parent.name for parent in path.absolute().parents[:3])]
    for name in names:
        for tag, statistics in {**_BY_TAG, **_BY_NAME}.items():
            if tag in name.lower():
                return statistics
    return None


def _configured(folder: Path) -> Statistics | None:
    preprocessor = folder / "preprocessor_config.json"
    if preprocessor.is_file():
        config = read_json(preprocessor)
        if "image_mean" in config and "image_std" in config:
            return named_statistics(config["image_mean"], config["image_std"])
    pretrained = read_config(folder).get("pretrained_cfg", {})
    if "mean" in pretrained and "std" in pretrained:
        return named_statistics(pretrained["mean"], pretrained["std"])
    return None
