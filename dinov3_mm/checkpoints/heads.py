"""Weights of downstream heads: released files, and heads that their official trainers wrote."""

import hashlib
import os
from pathlib import Path

import torch
from mmengine.logging import print_log
from mmengine.model import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from safetensors.torch import save_file
from torch import Tensor, nn

from .containers import open_checkpoint
from .head_names import KINDS, HeadNames, head_names
from .io import atomic_write
from .load import shortened
from .locate import local_path, torch_hub_folder

__all__ = ["KINDS", "DINOv3HeadPretrained", "export_head", "load_head"]

_CHUNK_BYTES = 2**22


def load_head(module: nn.Module, path: str | os.PathLike, *, kind: str) -> None:
    """Load a head file into its module, strictly, and log one line about it.

    Nothing in the file is executed. Floating-point tensors are cast to the module's dtype.

    Args:
        module: the head, e.g. the ``decode_head`` of a segmentor.
        path: file (.pth or .safetensors), http(s) URL, or the name of a file in torch hub's cache
            (``torch.hub.get_dir()/checkpoints``).
        kind: what the file is, a key of ``KINDS``.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If the kind is unknown, or the file is damaged, would run code, holds values
            that are not finite, is not the released file whose name it has, or does not fit the
            module tensor by tensor. The module is then untouched.
    """
    names = head_names(kind)
    path = _located(path)
    opened = open_checkpoint(path)
    if path.name in names.released:
        _check_hash(path)
    state = names.to_ours(opened.read(opened.names))
    _check(module, state, f"{path} (kind {kind!r})")
    module.load_state_dict(state)
    print_log(
        f"loaded {len(state)}/{len(state)} head tensors of kind {kind!r} from {path}",
        logger="current",
    )


def export_head(module: nn.Module, path: str | os.PathLike, *, kind: str) -> Path:
    """Write a head under official names, as safetensors; :func:`load_head` reads it back.

    Args:
        module: the head, as for :func:`load_head`.
        path: file to write, replaced if it exists.
        kind: a key of ``KINDS``.

    Returns:
        ``path``.

    Raises:
        ValueError: If the kind is unknown or cannot be exported.
    """
    names: HeadNames = head_names(kind)
    if names.to_released is None:
        raise ValueError(f"heads of kind {kind!r} cannot be exported; save their state dict")
    state = names.to_released(module.state_dict())
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic_write(path) as partial:
        save_file(tensors, partial)
    return Path(path)


def _located(path: str | os.PathLike) -> Path:
    """Local path of a head; a bare name that does not exist here is looked for in the cache."""
    local = local_path(path)
    cached = torch_hub_folder() / local.name
    if local.exists():
        return local
    if local.name == str(path) and cached.exists():
        return cached
    raise FileNotFoundError(
        f"no head at {local}, nor {cached}: expected a local file or an http(s) URL; heads are "
        "published with the backbones and gated like them, get the file from the publisher"
    )


def _check_hash(path: Path) -> None:
    """Check that the SHA-256 of a released file begins with the digits in its name."""
    digits = path.stem.rpartition("-")[2]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    found = digest.hexdigest()[: len(digits)]
    if found != digits:
        raise ValueError(
            f"{path} is not the released file of that name: its SHA-256 begins with {found} "
            f"instead of {digits}. Get the file again, or rename it if you changed it yourself"
        )


def _check(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Refuse tensors that do not fit ``module``, naming all of them, or are not finite."""
    target = module.state_dict()
    if any(tensor.is_meta for tensor in target.values()):
        raise ValueError("the head is on the meta device; give it storage (to_empty) first")
    problems = {
        "missing": [name for name in target if name not in state],
        "unexpected": [name for name in state if name not in target],
        "wrong shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in target.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    if any(problems.values()):
        lines = [f"{what} ({len(n)}): {shortened(n)}" for what, n in problems.items() if n]
        raise ValueError(
            "\n  ".join(
                (
                    f"the head {source} does not fit this {type(module).__name__}; nothing was "
                    "loaded. Widths come from the backbone, the last layer's size from num_classes",
                    *lines,
                )
            )
        )
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"the head {source} holds NaN or infinite values in {len(broken)} of {len(state)} "
            f"tensors, e.g. {shortened(broken, 5)}; nothing was loaded"
        )


@WEIGHT_INITIALIZERS.register_module()
class DINOv3HeadPretrained:
    """MMEngine initializer that loads a head file; see :func:`load_head`.

    ``tools/train.py`` and ``tools/test.py`` set ``checkpoint`` from ``--head FILE``.

    Args:
        kind: what the file is, e.g. 'linear_segmentation'.
        checkpoint: file, http(s) URL, or the name of a file in torch hub's cache. None is refused
            on use.

    Raises:
        ValueError: If the kind is unknown; on use, if no checkpoint is given, or it cannot be read
            or does not fit the head.
        FileNotFoundError: On use, if nothing is there.

    Example:
        >>> init_cfg = dict(
        ...     type="DINOv3HeadPretrained",
        ...     kind="linear_segmentation",
        ...     checkpoint="model_final.pth",
        ... )
    """

    def __init__(self, kind: str, checkpoint: str | os.PathLike | None = None) -> None:
        head_names(kind)
        self.kind = kind
        self.checkpoint = checkpoint

    def __call__(self, module: nn.Module) -> None:
        """Load the head into ``module``; all of it or nothing."""
        if self.checkpoint is None:
            raise ValueError(
                f"no weights for this {type(module).__name__}: give them with --head FILE or as "
                "init_cfg.checkpoint, or remove the head's init_cfg to train it from the start"
            )
        load_head(module, self.checkpoint, kind=self.kind)
        # MMEngine initialises the children after their parent: they would overwrite the weights.
        for child in module.modules():
            if hasattr(child, "init_weights"):
                child.is_init = True
        # MMEngine lists this for every parameter when a whole model is initialised.
        if hasattr(module, "_params_init_info"):
            update_init_info(module, init_info=f"{type(self).__name__}: {self.checkpoint}")
