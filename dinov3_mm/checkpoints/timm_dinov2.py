"""timm DINOv2 weights (``vit_*_patch14_*dinov2*``): no mask token, CLS position folded in."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .conversion import Conversion, ConversionRequest
from .dinov2_architecture import resampling_note
from .naming import NameTable, num_blocks, with_bias
from .timm_vit import drop_classifier

_TOP = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "register_tokens": "reg_token",
    **with_bias(("patch_embed.proj", "patch_embed.proj"), ("norm", "norm")),
}
_BLOCK = {
    "ls1.gamma": "ls1.gamma",
    "ls2.gamma": "ls2.gamma",
    **with_bias(*((name, name) for name in ("norm1", "norm2", "attn.qkv", "attn.proj"))),
}
_MLP = with_bias(("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"))
_SWIGLU = with_bias(("mlp.w12", "mlp.fc1"), ("mlp.w3", "mlp.fc2"))


def timm_dinov2_to_official(
    tensors: Mapping[str, Tensor], request: ConversionRequest
) -> Conversion:
    """Convert timm DINOv2 weights.

    The mask token becomes zero. timm's models with registers hold the sum of CLS token and its
    position; it becomes the CLS token, and the position zero. The library resamples the position
    embedding to the wanted size with a low-pass filter; the backbone does the same.

    Raises:
        ValueError: If the number of heads cannot be told.
    """
    state, left = _table(_is_gated(tensors)).to_official(tensors)
    dims, positions = state["pos_embed"].shape[-1], state["pos_embed"]
    head_dims, notes = request.head_dims(dims, num_blocks(state))
    arch = {
        "num_heads": dims // head_dims,
        "interpolate_offset": 0.0,
        "interpolate_antialias": True,
    }
    if math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        state["pos_embed"] = torch.cat((positions.new_zeros(1, 1, dims), positions), dim=1)
        notes.append("position of CLS made up (0, its value is part of the CLS token)")
    state["mask_token"] = positions.new_zeros(1, dims)
    notes += ["mask token made up (0)", *drop_classifier(left), resampling_note(arch, request)]
    return Conversion({**state, **left}, arch, notes)


def dinov2_to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert official DINOv2 weights to timm's names.

    With registers the position of CLS is added to the CLS token, as timm has it. The mask token is
    left out; a model without LayerScale gets factors of 1.

    Raises:
        ValueError: If the model has RMSNorm.
    """
    if "norm.bias" not in state_dict:
        raise ValueError("timm's DINOv2 has no RMSNorm; only LayerNorm models can be converted")
    state, _ = _table("blocks.0.mlp.w12.weight" in state_dict).to_foreign(state_dict)
    if "reg_token" in state:
        positions = state["pos_embed"]
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]
    ones = torch.ones_like(state_dict["cls_token"][0, 0])
    for block in range(num_blocks(state_dict)):
        for scale in ("ls1", "ls2"):
            state.setdefault(f"blocks.{block}.{scale}.gamma", ones)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _table(gated: bool) -> NameTable:
    return NameTable(_TOP, {**_BLOCK, **(_SWIGLU if gated else _MLP)})


def _is_gated(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the feed-forward is a SwiGLU, whose first matrix has two halves."""
    first, last = (tensors.get(f"blocks.0.mlp.fc{index}.weight") for index in (1, 2))
    return first is not None and last is not None and first.shape[0] == 2 * last.shape[1]
