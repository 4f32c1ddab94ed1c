"""Weights given by the name of a repository on the Hugging Face hub."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from .opening import open_checkpoint

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
