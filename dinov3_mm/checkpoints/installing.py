"""Weights into a backbone: every tensor of it, or none."""

import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .loading import ForeignCheckpoint, load_weights
from .report import LoadReport

# A norm that training uses for local crops only. Some released files carry it and some do not, and
# neither Hugging Face nor timm keeps it.
_LOCAL_NORM = "local_cls_norm."


def load_backbone_weights(
    module: nn.Module,
    path: str | os.PathLike,
    *,
    periods: str = "file",
    reset_bias_mask: bool = False,
) -> LoadReport:
    """Load weights of any known format into a backbone, strictly, and log one line about it.

    Args:
        module: backbone of this project.
        path: file, folder or http(s) URL; see :func:`load_weights`.
        periods: see :func:`load_weights`.
        reset_bias_mask: see :func:`load_weights`.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If the weights cannot be read, or do not fit the backbone tensor by tensor. The
            backbone is then untouched.
    """
    checkpoint = load_weights(
        path, periods=periods, reset_bias_mask=reset_bias_mask, arch=module.arch_settings
    )
    return install_weights(module, checkpoint)


def install_weights(module: nn.Module, checkpoint: ForeignCheckpoint) -> LoadReport:
    """Copy loaded weights into a backbone after all of them have been checked.

    ``local_cls_norm`` may be absent on either side: it is dropped, or made up from ``norm``.

    Raises:
        ValueError: If names or shapes differ; the backbone is then untouched.
    """
    target = module.state_dict()
    if any(tensor.is_meta for tensor in target.values()):
        raise ValueError("the backbone is on the meta device; give it storage (to_empty) first")
    state_dict, notes = _settle_local_norm(checkpoint.state_dict, target)
    problems = _compare(state_dict, target)
    if problems:
        mismatch = checkpoint.layout.family.describe_mismatch(
            checkpoint.state_dict, module.arch_settings
        )
        raise ValueError(
            "\n  ".join(
                (
                    f"the weights in {checkpoint.report.source} ({checkpoint.report.layout}) do "
                    f"not fit this {type(module).__name__}; nothing was loaded",
                    *problems,
                    f"architecture: {mismatch or 'the same in the file as asked for'}",
                )
            )
        )
    notes += _roundings(state_dict, target)
    module.load_state_dict(state_dict, strict=True)
    report = replace(
        checkpoint.report,
        num_tensors=len(target),
        notes=(*checkpoint.report.notes, *notes),
    )
    print_log(str(report), logger="current")
    return report


def _settle_local_norm(
    state_dict: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    state_dict = dict(state_dict)
    stored = [name for name in state_dict if name.startswith(_LOCAL_NORM)]
    wanted = [name for name in target if name.startswith(_LOCAL_NORM)]
    if stored and not wanted:
        for name in stored:
            del state_dict[name]
        return state_dict, ["local_cls_norm dropped"]
    sources = {name: name.removeprefix("local_cls_") for name in wanted}
    if wanted and not stored and all(source in state_dict for source in sources.values()):
        state_dict.update({name: state_dict[source] for name, source in sources.items()})
        return state_dict, ["local_cls_norm made up (copy of norm)"]
    return state_dict, []


def _compare(state_dict: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Sentences about everything that keeps the weights from fitting."""
    missing = [name for name in target if name not in state_dict]
    unexpected = [name for name in state_dict if name not in target]
    shapes = [
        f"{name} {tuple(state_dict[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in target.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
    return [f"{kind} ({len(names)}): {_shortened(names)}" for kind, names in kinds if names]


def _shortened(names: list[str], limit: int = 12) -> str:
    more = f", ... and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _roundings(state_dict: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Notes about tensors that lose precision because the backbone's dtype is narrower."""
    rounded: dict[torch.dtype, list[str]] = {}
    for name, tensor in target.items():
        stored = state_dict[name]
        if torch.promote_types(stored.dtype, tensor.dtype) != tensor.dtype and not torch.equal(
            stored.to(tensor.dtype).to(stored.dtype), stored
        ):
            rounded.setdefault(tensor.dtype, []).append(name)
    return [
        f"rounded to {str(dtype).removeprefix('torch.')}: {_shortened(names, 3)}"
        for dtype, names in rounded.items()
    ]
