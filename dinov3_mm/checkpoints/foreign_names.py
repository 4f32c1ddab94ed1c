"""Official weights of any backbone under the names of other libraries."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .hf_convnext import convnext_to_hf
from .hf_dinov2 import dinov2_to_hf
from .hf_vit import to_hf as vit_to_hf
from .selecting import select_backbone
from .timm_convnext import convnext_to_timm
from .timm_dinov2 import dinov2_to_timm
from .timm_vit import to_timm as vit_to_timm

# By class name in the MODELS registry.
TO_HF = {
    "DINOv3ViT": vit_to_hf,
    "DINOv3ConvNeXt": convnext_to_hf,
    "DINOv2ViT": dinov2_to_hf,
}
TO_TIMM = {
    "DINOv3ViT": vit_to_timm,
    "DINOv3ConvNeXt": convnext_to_timm,
    "DINOv2ViT": dinov2_to_timm,
}


def to_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert official weights to the names that Hugging Face writes to disk.

    Of a ViT, bias masks are folded into the biases; the RoPE periods, which the library computes
    exactly, and ``local_cls_norm``, which serves in training only, are left out. ConvNeXts lose
    nothing.

    Raises:
        ValueError: If these are not the official names of a backbone, or the library has no place
            for the model.
    """
    return _converter(TO_HF, state_dict, "Hugging Face")(state_dict)


def to_timm(state_dict: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Convert official weights to timm's names.

    Of a ViT, bias masks are folded into the biases; the mask token, the RoPE periods, which timm
    computes exactly, and ``local_cls_norm``, which serves in training only, are left out. ConvNeXts
    lose nothing.

    Args:
        state_dict: official names.
        **options: for a ViT ``qkv_bias``: True writes q and v biases, for a ``qkvb`` model; False
            leaves them out, for a plain model; None (default) writes them if there is a qkv bias.
            For a ConvNeXt ``conv_mlp``: True writes pointwise weights as 1 x 1 convolutions.

    Raises:
        TypeError: If the kind of backbone has no such option.
        ValueError: If these are not the official names of a backbone, or the library has no place
            for the model.
    """
    return _converter(TO_TIMM, state_dict, "timm")(state_dict, **options)


def _converter(
    table: Mapping[str, Callable[..., dict[str, Tensor]]],
    state_dict: Mapping[str, Tensor],
    library: str,
) -> Callable[..., dict[str, Tensor]]:
    selection = select_backbone(state_dict, "the state dict")
    if selection.layout.name != "official" or selection.prefix:
        raise ValueError(
            f"the state dict has {selection.layout.title} names under {selection.prefix!r}; "
            "expected the official names of a backbone, as load_weights returns them"
        )
    kind = selection.layout.family.backbone
    if kind not in table:
        raise ValueError(f"{kind} cannot be converted to {library}; {' and '.join(table)} can")
    return table[kind]
