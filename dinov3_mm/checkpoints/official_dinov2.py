"""The official DINOv2 layout: nothing to convert."""

from collections.abc import Mapping

from torch import Tensor

from .conversion import Conversion, ConversionRequest
from .dinov2_architecture import official_resampling, resampling_note


def official_dinov2_to_official(
    tensors: Mapping[str, Tensor], request: ConversionRequest
) -> Conversion:
    """Take the tensors as they are."""
    rule = official_resampling("register_tokens" in tensors)
    return Conversion(dict(tensors), notes=[resampling_note(rule, request)])
