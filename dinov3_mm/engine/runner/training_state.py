"""A training checkpoint as a file: tensors and plain values only, so that reading it runs no code.

::

    {'format_version': 1,
     'meta': {'iter', 'seed', 'cfg', 'versions', ...},
     'state_dict': {'student.backbone...': tensor, 'teacher...': tensor, ...},
     'optimizer': the optimizer wrapper's state, with the names of its parameters,
     ...}                    whatever hooks add in before_save_checkpoint
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dinov3_mm.checkpoints.io import atomic_write
from dinov3_mm.checkpoints.sharding import shard_state

FORMAT_VERSION = 1

# Within a folder of shards: what is no tensor.
STATE_FILE = "state.pth"

# Children of the algorithm that a later stage of the recipe adds (Gram anchoring).
STAGE_MODULES = ("gram_teacher",)

_PLAIN = (str, int, float, bool, type(None), Tensor)
_SHOWN_KEYS = 8


def write_training_state(path: str | Path, state: dict) -> None:
    """Write ``state`` aside and rename it when complete.

    Raises:
        TypeError: If something in it is neither a tensor nor a plain value, with its place.
    """
    _check_plain(state, "checkpoint")
    with atomic_write(path) as partial:
        torch.save({"format_version": FORMAT_VERSION, **state}, partial)


def read_training_state(path: str | Path, *, mmap: bool = False) -> dict:
    """Read a training checkpoint to the CPU without executing anything in it.

    Of a folder of shards: what is no tensor.

    Args:
        path: The file.
        mmap: Map the tensors instead of reading them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds objects that would have to be unpickled, or is not
            a training checkpoint of this format version.
    """
    path = Path(path)
    if path.is_dir():
        path = path / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no training checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # on what is no pickle the restricted unpickler fails in many ways
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{path} is not a readable training checkpoint (it is damaged, or holds Python objects "
            f"that only unpickling could rebuild, which is refused): {reason}"
        ) from None
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} is not a training checkpoint of format {FORMAT_VERSION}. Backbone weights are "
            "loaded with model.backbone.init_cfg=dict(type='DINOv3Pretrained', checkpoint=...)"
        )
    return state


def load_model_state(model: nn.Module, state_dict: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Load every tensor of a checkpoint; only a whole stage module may be absent from it.

    Args:
        model (nn.Module): The algorithm, unwrapped.
        state_dict (Mapping[str, Tensor]): Its tensors by name.

    Returns:
        tuple[str, ...]: Modules that the checkpoint lacks; they keep their values.

    Raises:
        ValueError: With the lists of missing, unexpected and misshapen keys.
    """
    own = model.state_dict()
    stored_modules = {key.split(".")[0] for key in state_dict}
    absent = tuple(
        name for name in STAGE_MODULES if name not in stored_modules and hasattr(model, name)
    )
    expected = {key for key in own if key.split(".")[0] not in absent}
    misshapen = [
        f"{key} (checkpoint {tuple(state_dict[key].shape)}, model {tuple(own[key].shape)})"
        for key in sorted(expected & state_dict.keys())
        if state_dict[key].shape != own[key].shape
    ]
    refuse_mismatch(expected - state_dict.keys(), state_dict.keys() - expected, misshapen)
    model.load_state_dict(shard_state(state_dict, own), strict=False)
    return absent


def refuse_mismatch(missing: set, unexpected: set, misshapen: list[str]) -> None:
    """Raise a ``ValueError`` that names the keys by which a checkpoint does not fit, if any."""
    problems = [
        f"{len(keys)} {kind}: {_some(keys)}"
        for kind, keys in (
            ("missing in the checkpoint", sorted(missing)),
            ("unknown to this config", sorted(unexpected)),
            ("of another shape", misshapen),
        )
        if keys
    ]
    if problems:
        raise ValueError("the checkpoint does not fit the model: " + "; ".join(problems))


def _some(keys: list[str]) -> str:
    rest = len(keys) - _SHOWN_KEYS
    return ", ".join(keys[:_SHOWN_KEYS]) + (f" and {rest} more" if rest > 0 else "")


def _check_plain(value: object, place: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, (str, int)):
                raise TypeError(f"{place}: a checkpoint key must be a str or int, got {key!r}")
            _check_plain(item, f"{place}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    elif not isinstance(value, _PLAIN):
        raise TypeError(
            f"{place} is a {type(value).__name__}; a checkpoint holds tensors, strings, numbers, "
            "booleans and None only, so that it can be read without unpickling"
        )
