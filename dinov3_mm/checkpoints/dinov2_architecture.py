"""The architecture of DINOv2 weights, read from the names and shapes of their tensors."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..models.backbones.dinov2_variants import (
    DINOV2_ARCHITECTURES,
    DINOV2_DEFAULTS,
    DINOV2_REGISTERS,
)
from .architecture_facts import (
    axis_size,
    check_complete,
    describe_differences,
    settings_facts,
    settings_of,
    shapes_of,
    tensor_facts,
)
from .conversion import ConversionRequest

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
