"""The architecture of ViT weights, read from the names and shapes of their tensors."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..models.backbones.vit_variants import VIT_ARCHITECTURES, VIT_DEFAULTS
from ..models.layers import ffn_hidden_dims
from .naming import num_blocks
from .periods import PERIODS_KEY


def vit_facts(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """What official ViT weights show about their architecture; None where a tensor is missing."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    dims = _size(shapes, "cls_token", -1)
    head_dims = 4 * (_size(shapes, PERIODS_KEY, 0) or 0)
    swiglu = "blocks.0.mlp.w1.weight" in shapes
    qkv_bias = _has(shapes, ".attn.qkv.bias")
    return {
        "embed_dims": dims,
        "num_layers": num_blocks(shapes),
        "num_heads": dims // head_dims if dims and head_dims and dims % head_dims == 0 else None,
        "patch_size": _size(shapes, "patch_embed.proj.weight", -1),
        "in_channels": _size(shapes, "patch_embed.proj.weight", 1),
        "num_registers": _size(shapes, "storage_tokens", 1) or 0,
        "ffn": "swiglu" if swiglu else "mlp",
        "ffn_hidden_dims": _size(shapes, f"blocks.0.mlp.{'w1' if swiglu else 'fc1'}.weight", 0),
        "qkv_bias": qkv_bias,
        "mask_k_bias": qkv_bias and _has(shapes, ".attn.qkv.bias_mask"),
        "ffn_bias": _has(shapes, ".mlp.fc1.bias", ".mlp.w1.bias"),
        "proj_bias": _has(shapes, ".attn.proj.bias"),
        "layer_scale": _has(shapes, ".ls1.gamma"),
        "norm": "layernorm" if _has(shapes, ".norm1.bias") else "rmsnorm",
        "untie_cls_and_patch_norms": "cls_norm.weight" in shapes,
        "untie_global_and_local_cls_norm": "local_cls_norm.weight" in shapes,
    }


def arch_facts(arch: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts of an architecture dict as the backbones take it."""
    same = (
        "embed_dims",
        "num_layers",
        "num_heads",
        "patch_size",
        "in_channels",
        "num_registers",
        "qkv_bias",
        "ffn_bias",
        "proj_bias",
        "untie_cls_and_patch_norms",
        "untie_global_and_local_cls_norm",
    )
    return {
        **{key: arch[key] for key in same},
        "ffn": "mlp" if arch["ffn_layer"] == "mlp" else "swiglu",
        "ffn_hidden_dims": ffn_hidden_dims(
            arch["ffn_layer"], arch["embed_dims"], arch["ffn_ratio"]
        ),
        "mask_k_bias": arch["qkv_bias"] and arch["mask_k_bias"],
        "layer_scale": bool(arch["layer_scale_init_value"]),
        "norm": "rmsnorm" if arch["norm_layer"] == "rmsnorm" else "layernorm",
    }


def infer_vit_arch(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Architecture dict for ``DINOv3ViT`` that fits official ViT weights.

    A row of the table of architectures where one fits; values that leave no trace in the tensors
    (the epsilon of the norms, the RoPE dtype) are those of the released models.

    Raises:
        ValueError: If a tensor that carries a size is missing, or the sizes make no sense.
    """
    facts = vit_facts(state_dict)
    unknown = [key for key, value in facts.items() if value is None]
    if unknown:
        raise ValueError(
            f"the architecture of the weights cannot be told: no {', '.join(unknown)}; tensors are "
            "missing or of the wrong shape"
        )
    rope = _rope(state_dict[PERIODS_KEY])
    for row in VIT_ARCHITECTURES.values():
        if arch_facts(row) == facts:
            return {**row, **rope}
    sizes = {key: facts[key] for key in ("embed_dims", "num_layers", "num_heads")}
    arch = {**sizes, **VIT_DEFAULTS, **{key: facts[key] for key in VIT_DEFAULTS if key in facts}}
    if facts["norm"] == "rmsnorm":
        arch["norm_layer"] = "rmsnorm"
    if not facts["layer_scale"]:
        arch["layer_scale_init_value"] = 0.0
    return {**arch, **_ffn(facts["ffn"], facts["embed_dims"], facts["ffn_hidden_dims"]), **rope}


def describe_vit_mismatch(state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> str:
    """How the architecture in the file differs from the one asked for; empty if it does not."""
    found, asked = vit_facts(state_dict), arch_facts(arch)
    return ", ".join(
        f"{key} {found[key]} in the file but {asked[key]} asked for"
        for key in found
        if found[key] != asked[key]
    )


def _size(shapes: Mapping[str, tuple[int, ...]], name: str, axis: int) -> int | None:
    shape = shapes.get(name, ())
    return shape[axis] if -len(shape) <= axis < len(shape) else None


def _has(names: Iterable[str], *endings: str) -> bool:
    return any(name.endswith(endings) for name in names)


def _ffn(kind: str, dims: int, hidden: int) -> dict[str, Any]:
    """Name and ratio that give the hidden width."""
    ratio = hidden / dims if kind == "mlp" else 1.5 * hidden / dims
    # Widths are truncated products: a quotient that was rounded down needs the next larger value.
    for candidate in (ratio, math.nextafter(ratio, math.inf)):
        if ffn_hidden_dims(kind, dims, candidate) == hidden:
            return {"ffn_layer": kind, "ffn_ratio": candidate}
    raise ValueError(
        f"a hidden width of {hidden} is impossible for a SwiGLU: no multiple of 8 (width {dims})"
    )


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
