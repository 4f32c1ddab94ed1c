"""Parameter groups of DINOv3 pretraining: layer-wise decay, what is not decayed, last layers."""

import re
from dataclasses import dataclass

from torch import nn

# What activation checkpointing, compilation and sharding put into parameter names.
_WRAPPERS = re.compile(r"_checkpoint_wrapped_module\.|_orig_mod\.|_fsdp_wrapped_module\.")
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_STEM = (
    "cls_token",
    "storage_tokens",
    "register_tokens",
    "mask_token",
    "pos_embed",
    "patch_embed.",
)
# The sub-module of the student that starts from trained weights when training is continued.
BACKBONE = "backbone"
_UNDECAYED = ("norm", "gamma", "fourier_w")


@dataclass(frozen=True)
class ParamMultipliers:
    """How one parameter's learning rate and weight decay follow the schedules.

    Attributes:
        lr_multiplier: Factor of the learning rate.
        wd_multiplier: Factor of the weight decay.
        is_last_layer: Whether the last-layer learning rate applies (a head's prototypes).
    """

    lr_multiplier: float
    wd_multiplier: float
    is_last_layer: bool


def plain_name(name: str) -> str:
    """Parameter name without what recomputation, compilation and sharding put into it."""
    return _WRAPPERS.sub("", name)


def param_multipliers(
    name: str,
    *,
    depth: int,
    layerwise_decay: float = 1.0,
    patch_embed_lr_mult: float = 1.0,
    lr_multiplier: float = 1.0,
    wd_multiplier: float = 1.0,
) -> ParamMultipliers:
    """Return the multipliers of a parameter from its name.

    The learning rate falls by ``layerwise_decay`` per layer below the final norm; tokens and patch
    embedding lie below the first block. Biases, norms and layer-scale gammas are not decayed;
    tokens and prototypes are.

    Args:
        name: Parameter name relative to the student's sub-module.
        depth: Number of blocks of the sub-module, 0 for heads and convolutional backbones.
        layerwise_decay: Factor per layer.
        patch_embed_lr_mult: Extra factor of the patch embedding.
        lr_multiplier: Factor of the whole sub-module.
        wd_multiplier: Weight-decay factor of what is decayed.
    """
    block = _BLOCK.match(name)
    if depth and name.startswith(_STEM):
        layer = 0
    elif depth and block:
        layer = int(block.group(1)) + 1
    else:
        layer = depth + 1
    lr_multiplier *= layerwise_decay ** (depth + 1 - layer)
    if name.startswith("patch_embed."):
        lr_multiplier *= patch_embed_lr_mult
    undecayed = name.endswith("bias") or any(part in name for part in _UNDECAYED)
    return ParamMultipliers(
        lr_multiplier, 0.0 if undecayed else wd_multiplier, "last_layer" in name
    )


def build_param_groups(module: nn.Module, submodule: str, **settings: float) -> list[dict]:
    """Collect the trainable parameters of one student sub-module into groups of equal multipliers.

    Args:
        module: The sub-module (backbone or head).
        submodule: Its name in the student; ``submodule`` of every group, by which gradients are
            clipped, and prefix of the parameter names.
        **settings: Arguments of :func:`param_multipliers` other than ``name`` and ``depth``.

    Returns:
        Optimizer groups in order of first appearance: ``params`` as ``(name, parameter)`` pairs,
        ``submodule``, ``lr_multiplier``, ``wd_multiplier``, ``is_last_layer``.
    """
    depth = len(getattr(module, "blocks", ()))
    groups: dict[ParamMultipliers, list] = {}
    for name, param in module.named_parameters():
        if param.requires_grad:
            name = plain_name(name)
            multipliers = param_multipliers(name, depth=depth, **settings)
            groups.setdefault(multipliers, []).append((f"{submodule}.{name}", param))
    return [
        {"params": params, "submodule": submodule, **vars(multipliers)}
        for multipliers, params in groups.items()
    ]
