"""Checkpoints of MMEngine's plain Runner, read without running what they hold."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from .containers import reason_of_refusal
from .load import shortened


def load_run_checkpoint(model: nn.Module, path: str | os.PathLike) -> dict[str, Any]:
    """Load a training checkpoint of a host's model, strictly.

    Tensors of a frozen backbone that the checkpoint leaves out come from their recorded source,
    see ``FrozenBackboneHook``. Objects in the file that could run code are refused.

    Args:
        model: the model of the checkpoint's config.
        path: file that MMEngine's runner wrote, or a bare state dict.

    Returns:
        The checkpoint's ``meta``, empty for a bare state dict.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read safely, or its tensors do not fit the model; the message
            names what is missing, unexpected or of another shape. The model may then hold parts.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    content = read_run_checkpoint(path)
    state = content.get("state_dict", content)
    # Averaged weights first: they are what validation saw.
    averaged = content.get("ema_state_dict")
    if averaged is not None:
        state = {**state, **{k.removeprefix("module."): v for k, v in averaged.items()}}
        state = {name: value for name, value in state.items() if name != "steps"}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit this model: {error}") from error
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit this model (another config, or another number of classes?)\n"
            f"  missing ({len(missing)}): {shortened(missing)}\n"
            f"  unexpected ({len(unexpected)}): {shortened(unexpected)}"
        )
    return content.get("meta", {})


def read_run_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Content of a checkpoint: tensors, numbers, strings and MMEngine's logged histories.

    Args:
        path: the file.
        mmap: map the tensors instead of reading them.

    Raises:
        ValueError: If it is damaged or holds anything else.
    """
    try:
        with torch.serialization.safe_globals(_SAFE):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # on what is no pickle the restricted unpickler fails in many ways
        raise ValueError(f"{path} was not loaded: {reason_of_refusal(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dict")
    return content


def _history_method(owner: Any, name: str) -> Any:
    """``getattr`` for the one use that a history makes of it: its own methods."""
    if not isinstance(owner, HistoryBuffer) and owner is not HistoryBuffer:
        raise pickle.UnpicklingError(f"getattr of a {type(owner).__name__} ({name!r})")
    if name.startswith("_"):
        raise pickle.UnpicklingError(f"getattr of {name!r}")
    return getattr(owner, name)


_multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray
_SAFE = [
    HistoryBuffer,
    np.ndarray,
    np.dtype,
    # numpy 1 and numpy 2 write different module names.
    *(
        (function, f"numpy.{module}.multiarray.{function.__name__}")
        for function in (_multiarray._reconstruct, _multiarray.scalar)
        for module in ("core", "_core")
    ),
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
    (_history_method, "builtins.getattr"),
]
