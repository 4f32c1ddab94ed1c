"""Hugging Face ``dinov3_convnext`` weights: other names, the final norm once."""

from collections.abc import Mapping

from torch import Tensor

from .conversion import Conversion, ConversionRequest
from .convnext_names import ConvNeXtNames
from .official_convnext import missing_scales, with_twin_norm, without_twin_norm

_NAMES = ConvNeXtNames(
    stem="stages.0.downsample_layers.{layer}",
    downsample="stages.{stage}.downsample_layers.{layer}",
    block="stages.{stage}.layers.{block}",
    parts={
        "dwconv": "depthwise_conv",
        "norm": "layer_norm",
        "pwconv1": "pointwise_conv1",
        "pwconv2": "pointwise_conv2",
    },
    norm="layer_norm",
)
_EPS = 1e-6


def hf_convnext_to_official(
    tensors: Mapping[str, Tensor], request: ConversionRequest
) -> Conversion:
    """Convert Hugging Face ConvNeXt weights, under the names on disk or in memory.

    Raises:
        ValueError: If the configuration states what no DINOv3 ConvNeXt has.
    """
    wanted = {"layer_norm_eps": _EPS, "hidden_act": "gelu"}
    for key, value in wanted.items():
        if request.config.get(key, value) != value:
            raise ValueError(f"{key} is {request.config[key]}; DINOv3's ConvNeXt has {value}")
    state, left = _NAMES.to_official(
        {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    )
    return Conversion({**with_twin_norm(state), **left})


def convnext_to_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert official ConvNeXt weights to the names that Hugging Face writes to disk.

    A model without ``gamma`` gets factors of 1.

    Raises:
        ValueError: If ``norm`` and ``norms.3`` differ.
    """
    state, _ = _NAMES.to_foreign(without_twin_norm(state_dict))
    state |= missing_scales(state, ".pointwise_conv2.bias")
    return {name: tensor.contiguous() for name, tensor in state.items()}
