"""The architecture of ConvNeXt weights, read from the names and shapes of their tensors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..models.backbones.convnext_trunk import NUM_STAGES
from ..models.backbones.convnext_variants import CONVNEXT_ARCHITECTURES, CONVNEXT_DEFAULTS
from .architecture_facts import (
    axis_size,
    check_complete,
    describe_differences,
    has_name,
    shapes_of,
)
from .convnext_names import OFFICIAL


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
