"""The architecture of ViT weights, read from the names and shapes of their tensors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..models.backbones.vit_variants import VIT_ARCHITECTURES, VIT_DEFAULTS
from .architecture_facts import (
    axis_size,
    check_complete,
    describe_differences,
    has_name,
    settings_facts,
    settings_of,
    shapes_of,
    tensor_facts,
)
from .periods import PERIODS_KEY

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
