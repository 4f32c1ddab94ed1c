"""What the tensors of any ViT show about its architecture, and what an architecture dict says."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..models.layers import ffn_hidden_dims
from .naming import num_blocks

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
