"""timm ConvNeXt weights (``convnext_*.dinov3_*``): other names, the final norm in the head."""

from collections.abc import Mapping

from torch import Tensor

from .conversion import Conversion, ConversionRequest
from .convnext_names import ConvNeXtNames
from .official_convnext import missing_scales, with_twin_norm, without_twin_norm

_NAMES = ConvNeXtNames(
    stem="stem.{layer}",
    downsample="stages.{stage}.downsample.{layer}",
    block="stages.{stage}.blocks.{block}",
    parts={"dwconv": "conv_dw", "norm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"},
    norm="head.norm",
)
_CLASSIFIER = ("head.fc.weight", "head.fc.bias")


def timm_convnext_to_official(
    tensors: Mapping[str, Tensor], request: ConversionRequest
) -> Conversion:
    """Convert timm ConvNeXt weights; pointwise layers may be linear or 1 x 1 convolutions."""
    state, left = _NAMES.to_official(tensors)
    notes = []
    if [left.pop(name) for name in _CLASSIFIER if name in left]:
        notes.append("classifier head dropped")
    state = {
        name: tensor.flatten(1) if ".pwconv" in name and tensor.ndim == 4 else tensor
        for name, tensor in state.items()
    }
    return Conversion({**with_twin_norm(state), **left}, notes=notes)


def convnext_to_timm(
    state_dict: Mapping[str, Tensor], *, conv_mlp: bool = False
) -> dict[str, Tensor]:
    """Convert official ConvNeXt weights to timm's names.

    A model without ``gamma`` gets factors of 1.

    Args:
        state_dict: official names.
        conv_mlp: pointwise weights as 1 x 1 convolutions (D, C, 1, 1), for models built with
            ``conv_mlp=True``.

    Raises:
        ValueError: If ``norm`` and ``norms.3`` differ.
    """
    state, _ = _NAMES.to_foreign(without_twin_norm(state_dict))
    state |= missing_scales(state, ".mlp.fc2.bias")
    if conv_mlp:
        state = {
            name: tensor[..., None, None] if ".mlp.fc" in name and tensor.ndim == 2 else tensor
            for name, tensor in state.items()
        }
    return {name: tensor.contiguous() for name, tensor in state.items()}
