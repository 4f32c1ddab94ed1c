"""The architecture of weights, read from the names and shapes of their tensors."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from dinov3_mm.models.backbones.convnext import NUM_STAGES
from dinov3_mm.models.backbones.zoo import (
    CONVNEXT_ARCHITECTURES,
    CONVNEXT_DEFAULTS,
    DINOV2_ARCHITECTURES,
    DINOV2_DEFAULTS,
    DINOV2_REGISTERS,
    VIT_ARCHITECTURES,
    VIT_DEFAULTS,
)
from dinov3_mm.models.layers import ffn_hidden_dims

from .conversion import OFFICIAL, PERIODS_KEY, Conversion, ConversionRequest, num_blocks

# --- What tensors and settings of any ViT show ---


Shapes = Mapping[str, tuple[int, ...]]

_SAME = (
    "embed_dims",
    "num_layers",
    "patch_size",
    "in_channels",
    "num_registers",
    "qkv_bias",
    "ffn_bias",
    "proj_bias",
)


def shapes_of(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def tensor_facts(shapes: Shapes, *, registers: str, gate: str) -> dict[str, Any]:
    """What official weights show; None where a tensor is missing.

    Args:
        shapes: by official name.
        registers: name of the register tokens.
        gate: name inside a block of the first matrix of a SwiGLU.
    """
    swiglu = f"blocks.0.{gate}.weight" in shapes
    return {
        "embed_dims": axis_size(shapes, "cls_token", -1),
        "num_layers": num_blocks(shapes),
        "patch_size": axis_size(shapes, "patch_embed.proj.weight", -1),
        "in_channels": axis_size(shapes, "patch_embed.proj.weight", 1),
        "num_registers": axis_size(shapes, registers, 1) or 0,
        "ffn": "swiglu" if swiglu else "mlp",
        "ffn_hidden_dims": axis_size(shapes, f"blocks.0.{gate if swiglu else 'mlp.fc1'}.weight", 0),
        "qkv_bias": has_name(shapes, ".attn.qkv.bias"),
        "ffn_bias": has_name(shapes, ".mlp.fc1.bias", f".{gate}.bias"),
        "proj_bias": has_name(shapes, ".attn.proj.bias"),
        "layer_scale": has_name(shapes, ".ls1.gamma"),
        "norm": "layernorm" if has_name(shapes, ".norm1.bias") else "rmsnorm",
    }


def settings_facts(arch: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts of an architecture dict as the backbones take it."""
    return {
        **{key: arch[key] for key in _SAME},
        "ffn": "mlp" if arch["ffn_layer"] == "mlp" else "swiglu",
        "ffn_hidden_dims": ffn_hidden_dims(
            arch["ffn_layer"], arch["embed_dims"], arch["ffn_ratio"]
        ),
        "layer_scale": bool(arch["layer_scale_init_value"]),
        "norm": "rmsnorm" if arch["norm_layer"] == "rmsnorm" else "layernorm",
    }


def check_complete(facts: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` if a tensor that carries a size is missing."""
    unknown = [key for key, value in facts.items() if value is None]
    if unknown:
        raise ValueError(
            f"the architecture of the weights cannot be told: no {', '.join(unknown)}; tensors are "
            "missing or of the wrong shape"
        )


def settings_of(
    facts: Mapping[str, Any], defaults: Mapping[str, Any], gated_ffn: str
) -> dict[str, Any]:
    """Architecture values for facts that no row of a table has; the others are the defaults.

    Args:
        facts: complete ones.
        defaults: values by key, as the backbone takes them.
        gated_ffn: what the family calls its SwiGLU.

    Raises:
        ValueError: If no ratio gives the hidden width.
    """
    known = {key: facts[key] for key in ("embed_dims", "num_layers", *defaults) if key in facts}
    arch = {**defaults, **known}
    if facts["norm"] == "rmsnorm":
        arch["norm_layer"] = "rmsnorm"
    if not facts["layer_scale"]:
        arch["layer_scale_init_value"] = 0.0
    kind = gated_ffn if facts["ffn"] == "swiglu" else "mlp"
    ratio = _ffn_ratio(kind, facts["embed_dims"], facts["ffn_hidden_dims"], arch["ffn_ratio"])
    return {**arch, "ffn_layer": kind, "ffn_ratio": ratio}


def describe_differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Facts of a file that differ from those asked for, in words; empty if none does."""
    return ", ".join(
        f"{key} {found[key]} in the file but {asked[key]} asked for"
        for key in found
        if found[key] != asked[key]
    )


def axis_size(shapes: Shapes, name: str, axis: int) -> int | None:
    """Length of an axis of a tensor, None if there is none."""
    shape = shapes.get(name, ())
    return shape[axis] if -len(shape) <= axis < len(shape) else None


def has_name(names: Iterable[str], *endings: str) -> bool:
    """Whether any name ends in one of ``endings``."""
    return any(name.endswith(endings) for name in names)


def _ffn_ratio(kind: str, dims: int, hidden: int, usual: float) -> float:
    """Ratio that gives the hidden width; the usual one if it does."""
    ratio = hidden / dims if kind == "mlp" else 1.5 * hidden / dims
    # Widths are truncated products: a quotient that was rounded down needs the next larger value.
    for candidate in (usual, ratio, math.nextafter(ratio, math.inf)):
        if ffn_hidden_dims(kind, dims, candidate) == hidden:
            return candidate
    raise ValueError(
        f"a hidden width of {hidden} is impossible for a SwiGLU: no multiple of 8 (width {dims})"
    )


# --- ViT ---


_OWN = ("num_heads", "untie_cls_and_patch_norms", "untie_global_and_local_cls_norm")


def vit_facts(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """What official ViT weights show about their architecture; None where a tensor is missing."""
    shapes = shapes_of(state_dict)
    facts = tensor_facts(shapes, registers="storage_tokens", gate="mlp.w1")
    dims, head_dims = facts["embed_dims"], 4 * (axis_size(shapes, PERIODS_KEY, 0) or 0)
    return {
        **facts,
        "num_heads": dims // head_dims if dims and head_dims and dims % head_dims == 0 else None,
        "mask_k_bias": facts["qkv_bias"] and has_name(shapes, ".attn.qkv.bias_mask"),
        "untie_cls_and_patch_norms": "cls_norm.weight" in shapes,
        "untie_global_and_local_cls_norm": "local_cls_norm.weight" in shapes,
    }


def arch_facts(arch: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts of an architecture dict as the backbones take it."""
    return {
        **settings_facts(arch),
        **{key: arch[key] for key in _OWN},
        "mask_k_bias": arch["qkv_bias"] and arch["mask_k_bias"],
    }


def infer_vit_arch(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Architecture dict for ``DINOv3ViT`` that fits official ViT weights.

    A row of the table of architectures where one fits; values that leave no trace in the tensors
    (the epsilon of the norms, the RoPE dtype) are those of the released models.

    Raises:
        ValueError: If a tensor that carries a size is missing, or the sizes make no sense.
    """
    facts = vit_facts(state_dict)
    check_complete(facts)
    rope = _rope(state_dict[PERIODS_KEY])
    for row in VIT_ARCHITECTURES.values():
        if arch_facts(row) == facts:
            return {**row, **rope}
    return {
        **settings_of(facts, VIT_DEFAULTS, "swiglu"),
        "num_heads": facts["num_heads"],
        **rope,
    }


def describe_vit_mismatch(state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> str:
    """How the architecture in the file differs from the one asked for; empty if it does not."""
    return describe_differences(vit_facts(state_dict), arch_facts(arch))


def _rope(periods: Tensor) -> dict[str, float | None]:
    """Formula of stored periods: base 100 if they look like it, else their two ends."""
    values = periods.double()
    steps = values.numel()
    released = 100.0 ** ((values.new_tensor(range(steps))) / steps)
    if ((values / released - 1).abs() < 2e-2).all():
        return {"rope_base": 100.0, "rope_min_period": None, "rope_max_period": None}
    if values[0] == 1:
        # The last period is base ** ((steps - 1) / steps).
        base = values[-1].item() ** (steps / (steps - 1))
        return {"rope_base": base, "rope_min_period": None, "rope_max_period": None}
    ends = {"rope_min_period": values[0].item(), "rope_max_period": values[-1].item()}
    return {"rope_base": None, **ends}


# --- ConvNeXt ---


def convnext_facts(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """What official weights show about their architecture; None where a tensor is missing."""
    shapes = shapes_of(state_dict)
    convs = ["downsample_layers.0.0", *(f"downsample_layers.{i}.1" for i in range(1, NUM_STAGES))]
    dims = [axis_size(shapes, f"{conv}.weight", 0) for conv in convs]
    depths = OFFICIAL.depths(shapes)
    return {
        "depths": depths if all(depths) else None,
        "dims": dims if all(dims) else None,
        "in_channels": axis_size(shapes, "downsample_layers.0.0.weight", 1),
        "layer_scale": has_name(shapes, ".gamma"),
    }


def convnext_arch_facts(arch: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts of an architecture dict as ``DINOv3ConvNeXt`` takes it."""
    return {
        "depths": list(arch["depths"]),
        "dims": list(arch["dims"]),
        "in_channels": arch["in_channels"],
        "layer_scale": bool(arch["layer_scale_init_value"]),
    }


def infer_convnext_arch(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Architecture dict for ``DINOv3ConvNeXt`` that fits official weights.

    A row of the table of architectures where one fits. ``patch_size``, which leaves no trace in the
    tensors, is None as in the released models.

    Raises:
        ValueError: If a tensor that carries a size is missing.
    """
    facts = convnext_facts(state_dict)
    check_complete(facts)
    for row in CONVNEXT_ARCHITECTURES.values():
        if convnext_arch_facts(row) == facts:
            return dict(row)
    arch = {**CONVNEXT_DEFAULTS, **{key: facts[key] for key in ("depths", "dims", "in_channels")}}
    return arch if facts["layer_scale"] else {**arch, "layer_scale_init_value": 0.0}


def describe_convnext_mismatch(state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> str:
    """How the architecture in the file differs from the one asked for; empty if it does not."""
    return describe_differences(convnext_facts(state_dict), convnext_arch_facts(arch))


# --- DINOv2 ---


_RULE = ("interpolate_offset", "interpolate_antialias")


def dinov2_facts(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """What official weights show about their architecture; None where a tensor is missing."""
    shapes = shapes_of(state_dict)
    facts = tensor_facts(shapes, registers="register_tokens", gate="mlp.w12")
    if facts["ffn"] == "swiglu":
        facts["ffn_hidden_dims"] //= 2
    num_positions, patch_size = axis_size(shapes, "pos_embed", 1), facts["patch_size"]
    side = math.isqrt(num_positions - 1) if num_positions else 0
    square = bool(num_positions) and side**2 == num_positions - 1
    return {**facts, "img_size": side * patch_size if square and patch_size else None}


def dinov2_arch_facts(arch: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts of an architecture dict as ``DINOv2ViT`` takes it."""
    return {**settings_facts(arch), "img_size": arch["img_size"]}


def infer_dinov2_arch(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Architecture dict for ``DINOv2ViT`` that fits official weights.

    A row of the table of architectures where one fits. What leaves no trace in the tensors is as in
    the released models: the epsilon of the norms, 64 channels per head (without ``num_heads`` where
    that is impossible), the way in which the position embedding is resampled.

    Raises:
        ValueError: If a tensor that carries a size is missing, or the sizes make no sense.
    """
    facts = dinov2_facts(state_dict)
    check_complete(facts)
    for row in DINOV2_ARCHITECTURES.values():
        if dinov2_arch_facts(row) == facts:
            return dict(row)
    arch = settings_of(facts, DINOV2_DEFAULTS, "swiglufused")
    if facts["embed_dims"] % 64 == 0:
        arch["num_heads"] = facts["embed_dims"] // 64
    return {**arch, **official_resampling(facts["num_registers"])}


def describe_dinov2_mismatch(state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> str:
    """How the architecture in the file differs from the one asked for; empty if it does not."""
    return describe_differences(dinov2_facts(state_dict), dinov2_arch_facts(arch))


def official_resampling(num_registers: int) -> dict[str, Any]:
    """How the official code resamples the position embedding, by presence of registers."""
    source = DINOV2_REGISTERS if num_registers else DINOV2_DEFAULTS
    return {key: source[key] for key in _RULE}


def resampling_note(rule: Mapping[str, Any], request: ConversionRequest) -> str:
    """How the source resamples its position embedding, and the wanted backbone if otherwise."""
    note = f"position embedding resampled with {_words(rule)}"
    if request.arch and any(request.arch.get(key, rule[key]) != rule[key] for key in _RULE):
        return f"{note} by the source, with {_words(request.arch)} by the backbone"
    return note


def _words(rule: Mapping[str, Any]) -> str:
    antialias = "" if rule["interpolate_antialias"] else "no "
    return f"offset {rule['interpolate_offset']:g} and {antialias}antialias"


def official_dinov2_to_official(
    tensors: Mapping[str, Tensor], request: ConversionRequest
) -> Conversion:
    """Take the tensors as they are."""
    rule = official_resampling("register_tokens" in tensors)
    return Conversion(dict(tensors), notes=[resampling_note(rule, request)])
