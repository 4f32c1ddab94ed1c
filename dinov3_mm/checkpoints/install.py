"""Weights into a backbone: every tensor of it, or none, unless a part is asked for."""

import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .inflation import check_rule, inflate_first_layer, inflation_hint
from .loading import ForeignCheckpoint, load_weights
from .periods import PERIODS_KEY, rope_note
from .report import LoadReport, shortened
from .sharding import shard_state
from .unread import reading_for_shards

# A norm that training uses for local crops only. Some released files carry it and some do not, and
# neither Hugging Face nor timm keeps it.
_LOCAL_NORM = "local_cls_norm."


def load_backbone_weights(
    module: nn.Module,
    path: str | os.PathLike,
    *,
    periods: str = "file",
    reset_bias_mask: bool = False,
    allow_partial: bool = False,
    inflate: str | None = None,
) -> LoadReport:
    """Load weights of any known format into a backbone, strictly, and log one line about it.

    Args:
        module: backbone of this project.
        path: file, folder, http(s) URL or hub name; see :func:`load_weights`.
        periods: see :func:`load_weights`.
        reset_bias_mask: see :func:`load_weights`.
        allow_partial: load the tensors that fit and leave the others of the backbone as they are.
            The line names what is missing, unexpected or of another shape.
        inflate: rule of :mod:`~dinov3_mm.checkpoints.inflation` by which weights for another
            number of image channels are adapted: 'mean', 'repeat', 'zero' or 'append_mean'.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If the weights cannot be read, or do not fit the backbone tensor by tensor (with
            ``allow_partial``: if none fits). The backbone is then untouched.
    """
    check_rule(inflate)
    # Inflation computes with the first layer.
    with reading_for_shards(inflate is None and _is_sharded(module)):
        checkpoint = load_weights(
            path, periods=periods, reset_bias_mask=reset_bias_mask, arch=module.arch_settings
        )
    return install_weights(module, checkpoint, allow_partial=allow_partial, inflate=inflate)


def _is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def install_weights(
    module: nn.Module,
    checkpoint: ForeignCheckpoint,
    *,
    allow_partial: bool = False,
    inflate: str | None = None,
) -> LoadReport:
    """Copy loaded weights into a backbone after all of them have been checked.

    ``local_cls_norm`` may be absent on either side: it is dropped, or made up from ``norm``. For
    ``allow_partial`` and ``inflate`` see :func:`load_backbone_weights`.

    Raises:
        ValueError: If names or shapes differ (with ``allow_partial``: if nothing fits); the
            backbone is then untouched.
    """
    target = module.state_dict()
    if any(tensor.is_meta for tensor in target.values()):
        raise ValueError("the backbone is on the meta device; give it storage (to_empty) first")
    state_dict, notes = _settle_local_norm(checkpoint.state_dict, target)
    state_dict, inflation = inflate_first_layer(state_dict, target, inflate)
    notes += inflation
    differences = _compare(state_dict, target)
    fitting = {
        name: tensor
        for name, tensor in state_dict.items()
        if name not in differences["unexpected"] and name not in differences["other_shape"]
    }
    if any(differences.values()) and not (allow_partial and fitting):
        raise ValueError(_refusal(module, checkpoint, differences, state_dict, target))
    notes += _roundings(fitting, target)
    trained = None if checkpoint.metadata else checkpoint.stated_arch.get("rope_dtype")
    notes += rope_note(fitting.get(PERIODS_KEY), trained, module)
    module.load_state_dict(shard_state(fitting, target), strict=not allow_partial)
    report = replace(
        checkpoint.report,
        num_tensors=len(target),
        notes=(*checkpoint.report.notes, *notes),
        **{kind: tuple(names) for kind, names in differences.items()},
    )
    print_log(str(report), logger="current")
    return report


def _refusal(
    module: nn.Module,
    checkpoint: ForeignCheckpoint,
    differences: Mapping[str, list[str]],
    state_dict: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
) -> str:
    """The message about weights that do not fit."""
    shapes = [
        f"{name} {tuple(state_dict[name].shape)} instead of {tuple(target[name].shape)}"
        for name in differences["other_shape"]
    ]
    kinds = {
        "missing": differences["missing"],
        "unexpected": differences["unexpected"],
        "wrong shape": shapes,
    }
    family, kinds_of_module = checkpoint.layout.family, [cls.__name__ for cls in type(module).mro()]
    if family.backbone in kinds_of_module:
        mismatch = family.describe_mismatch(checkpoint.state_dict, module.arch_settings)
    else:
        mismatch = f"{family.backbone} in the file but {kinds_of_module[0]} asked for"
    advice = inflation_hint(state_dict, target)
    return "\n  ".join(
        (
            f"the weights in {checkpoint.report.source} ({checkpoint.report.layout}) do "
            f"not fit this {type(module).__name__}; nothing was loaded",
            *(
                f"{kind} ({len(names)}): {shortened(names)}"
                for kind, names in kinds.items()
                if names
            ),
            f"architecture: {mismatch or 'the same in the file as asked for'}",
            *((advice,) if advice else ()),
        )
    )


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


def _compare(
    state_dict: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """Names of everything that keeps the weights from fitting, by kind."""
    return {
        "missing": [name for name in target if name not in state_dict],
        "unexpected": [name for name in state_dict if name not in target],
        "other_shape": [
            name
            for name, tensor in target.items()
            if name in state_dict and state_dict[name].shape != tensor.shape
        ],
    }


def _roundings(state_dict: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Notes about tensors that lose precision because the backbone's dtype is narrower."""
    rounded: dict[torch.dtype, list[str]] = {}
    for name, stored in state_dict.items():
        tensor = target[name]
        narrows = torch.promote_types(stored.dtype, tensor.dtype) != tensor.dtype
        # Unread tensors are taken to lose what they may lose.
        if narrows and (
            stored.is_meta or not torch.equal(stored.to(tensor.dtype).to(stored.dtype), stored)
        ):
            rounded.setdefault(tensor.dtype, []).append(name)
    return [
        f"rounded to {str(dtype).removeprefix('torch.')}: {shortened(names, 3)}"
        for dtype, names in rounded.items()
    ]
