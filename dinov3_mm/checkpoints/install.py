"""Weights into a backbone: every tensor of it, or none, unless a part is asked for."""

import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from mmengine.logging import print_log
from mmengine.model import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov3_mm.checkpoints.formats.conversion import PERIODS_KEY, rope_note
from dinov3_mm.errors import hint

from .load import (
    ForeignCheckpoint,
    LoadReport,
    load_weights,
    reading_for_shards,
    shard_state,
    shortened,
)

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
        inflate: rule of :mod:`~dinov3_mm.checkpoints.install` by which weights for another
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


# --- The patch embedding of loaded weights for another number of image channels ---
#
# With K kernels ``W_k`` in the file (3: red, green, blue) and C channels in the backbone, a rule
# gives the kernels ``V_c``; the bias stays. Statements about inputs are about normalised inputs:
# channels that are equal as pixels differ after normalisation with a mean and std of their own.
#
# - ``'mean'``: ``V_c = (1 / C) * sum_k W_k``, the mean of the kernels times K / C. An image whose
#   channels are all equal gives the embedding of the K-channel model; for C = 1 this is the sum of
#   the kernels.
# - ``'repeat'``: with ``n = max(C, K)``, ``V_c = sum of W_(i mod K) / m_(i mod K)`` over the ``i <
#   n`` with ``i mod C = c``, where ``m_k`` counts the ``i < n`` with ``i mod K = k``. For C >= K
#   the kernels are repeated cyclically, each divided by the number of its copies (times K / C
#   where K divides C); for C < K they are folded cyclically, for C = 1 into their sum. An image
#   whose channels are all equal gives the embedding of the K-channel model.
# - ``'zero'``: ``V_c = W_c`` for c < K, else 0. The first K channels give the embedding of the
#   K-channel model whatever the others hold. Needs C >= K.
# - ``'append_mean'``: ``V_c = W_c`` for c < K, else ``(1 / K) * sum_k W_k``, without rescaling:
#   how the DINOv3 paper adapts its satellite backbone to a fourth, infrared channel. Needs C >= K.


RULES = ("mean", "repeat", "zero", "append_mean")
# The first layer of a ViT and of a ConvNeXt, (D, C, p, p).
FIRST_LAYERS = ("patch_embed.proj.weight", "downsample_layers.0.0.weight")


def check_rule(rule: str | None) -> None:
    """Raise ValueError unless ``rule`` is a rule or None."""
    if rule is not None and rule not in RULES:
        raise ValueError(f"inflate is {rule!r}; expected one of {RULES}; {hint(str(rule), RULES)}")


def inflate_kernels(weight: Tensor, channels: int, rule: str) -> Tensor:
    """Kernels (D, K, p, p) for K channels as kernels (D, ``channels``, p, p), in the same dtype.

    Raises:
        ValueError: If the rule is unknown, or cannot reduce the number of channels.
    """
    check_rule(rule)
    stored = weight.shape[1]
    if rule in ("zero", "append_mean") and channels < stored:
        raise ValueError(
            f"inflate={rule!r} keeps the {stored} kernels of the file, but the backbone has only "
            f"{channels} channels; use 'mean' or 'repeat'"
        )
    mixing = _mixing_matrix(stored, channels, rule).to(weight.device)
    return torch.einsum("ck,dkhw->dchw", mixing, weight.double()).to(weight.dtype).contiguous()


def inflate_first_layer(
    state_dict: Mapping[str, Tensor], target: Mapping[str, Tensor], rule: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    """State dict whose first layer has the channels of ``target``, and notes about the change.

    Nothing changes without a rule, or where the channels agree.
    """
    state_dict, notes = dict(state_dict), []
    name = _differing_layer(state_dict, target)
    if rule is not None and name is not None:
        stored, channels = state_dict[name].shape[1], target[name].shape[1]
        state_dict[name] = inflate_kernels(state_dict[name], channels, rule)
        notes = [
            f"{name} inflated from {stored} to {channels} channels ({rule}), for which the "
            "statistics of the file do not hold"
        ]
    return state_dict, notes


def inflation_hint(state_dict: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str | None:
    """What to do about a first layer with other channels; None where it has the same."""
    name = _differing_layer(state_dict, target)
    if name is None:
        return None
    return (
        f"the file is for {state_dict[name].shape[1]} image channels, the backbone for "
        f"{target[name].shape[1]} (in_channels): give inflate='mean' (or another of "
        f"{', '.join(RULES)}) to adapt the first layer"
    )


def _differing_layer(state_dict: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str | None:
    """Name of the first layer if its kernels differ in their input channels alone."""
    for name in FIRST_LAYERS:
        if name in state_dict and name in target:
            stored, wanted = state_dict[name].shape, target[name].shape
            same_kernels = (stored[0], *stored[2:]) == (wanted[0], *wanted[2:])
            if len(stored) == 4 and same_kernels and stored[1] != wanted[1]:
                return name
    return None


def _mixing_matrix(stored: int, channels: int, rule: str) -> Tensor:
    """Shares (channels, stored) of the stored kernels in the new ones, float64."""
    if rule == "mean":
        return torch.full((channels, stored), 1 / channels, dtype=torch.float64)
    if rule == "repeat":
        steps = torch.arange(max(channels, stored))
        matrix = torch.zeros(channels, stored, dtype=torch.float64)
        matrix[steps % channels, steps % stored] = 1
        return matrix / matrix.sum(0)
    matrix = torch.eye(channels, stored, dtype=torch.float64)
    if rule == "append_mean":
        matrix[stored:] = 1 / stored
    return matrix


# --- From a config ---


@WEIGHT_INITIALIZERS.register_module()
class DINOv3Pretrained:
    """MMEngine initializer that loads a backbone from a weight file of any known format.

    Args:
        checkpoint: file, folder, http(s) URL, hub name, or name of a released checkpoint; see
            :func:`load_weights`. None is refused on use.
        reset_bias_mask: set the mask of the qkv bias to 1/0/1, so that the q and v biases of
            released weights train.
        periods: 'file' or 'exact'; see :func:`load_weights`.
        allow_partial: load the tensors that fit; the others keep the backbone's own
            initialisation.
        inflate: 'mean', 'repeat', 'zero' or 'append_mean' to adapt weights for another number of
            image channels; see :mod:`~dinov3_mm.checkpoints.install`.

    Raises:
        ValueError: If ``inflate`` is no such rule.
        FileNotFoundError: On use, if nothing is there.
        ValueError: On use, if no checkpoint is given, or the weights cannot be read or do not fit
            the backbone.

    Example:
        >>> init_cfg = dict(type="DINOv3Pretrained", checkpoint="dinov3_vits16.pth")
        >>> backbone = dict(type="DINOv3ViT", arch="small", init_cfg=init_cfg)
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike | None,
        reset_bias_mask: bool = False,
        periods: str = "file",
        allow_partial: bool = False,
        inflate: str | None = None,
    ) -> None:
        check_rule(inflate)
        self.checkpoint = checkpoint
        self.reset_bias_mask = reset_bias_mask
        self.periods = periods
        self.allow_partial = allow_partial
        self.inflate = inflate

    def __call__(self, module: nn.Module) -> None:
        """Load the weights into ``module``; all of it or nothing, unless partial."""
        if self.checkpoint is None:
            raise ValueError(
                f"no weights for this {type(module).__name__}: give them with --weights FILE or as "
                "init_cfg.checkpoint, or set the backbone's init_cfg=None to leave it random"
            )
        options = {
            "periods": self.periods,
            "reset_bias_mask": self.reset_bias_mask,
            "allow_partial": self.allow_partial,
            "inflate": self.inflate,
        }
        report = load_backbone_weights(module, self.checkpoint, **options)
        module.weights_origin = {"checkpoint": self.checkpoint, **options}
        # MMEngine lists this for every parameter when a whole model is initialised.
        if hasattr(module, "_params_init_info"):
            update_init_info(module, init_info=f"{type(self).__name__}: {report}")
