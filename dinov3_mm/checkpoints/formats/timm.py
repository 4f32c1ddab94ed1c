"""timm ViT weights (``vit_*_dinov3*``): split biases, other names, no mask token, no periods."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .conversion import Conversion, ConversionRequest
from .naming import NameTable, num_blocks, with_bias
from .official_vit import refuse_special_norms
from .periods import PERIODS_KEY, made_up_periods
from .qkv_bias import add_masked_bias, effective_bias

_TOP = {
    "cls_token": "cls_token",
    "storage_tokens": "reg_token",
    **with_bias(("patch_embed.proj", "patch_embed.proj"), ("norm", "norm")),
}
_BLOCK = {
    "attn.qkv.weight": "attn.qkv.weight",
    "ls1.gamma": "gamma_1",
    "ls2.gamma": "gamma_2",
    **with_bias(("norm1", "norm1"), ("norm2", "norm2"), ("attn.proj", "attn.proj")),
}
_MLP = with_bias(("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"))
_SWIGLU = with_bias(("mlp.w1", "mlp.fc1_g"), ("mlp.w2", "mlp.fc1_x"), ("mlp.w3", "mlp.fc2"))
_CLASSIFIER = ("head.weight", "head.bias")


def timm_to_official(tensors: Mapping[str, Tensor], request: ConversionRequest) -> Conversion:
    """Convert timm ViT weights, of the plain models and of the ``qkvb`` twins.

    The mask token becomes zero and the RoPE periods are computed. A plain file has no qkv bias,
    because the released one is zero; zeros are written back unless the backbone has none (7B).

    Raises:
        ValueError: If the number of heads cannot be told.
    """
    swiglu = any(".mlp.fc1_g." in name for name in tensors)
    state, left = _table(swiglu).to_official(tensors)
    dims, depth = state["storage_tokens"].shape[-1], num_blocks(state)
    head_dims, notes = request.head_dims(dims, depth)
    base = request.config.get("model_args", {}).get("rope_temperature")
    state[PERIODS_KEY], periods_note = made_up_periods(head_dims, request, base)
    state["mask_token"] = state["storage_tokens"].new_zeros(1, dims)
    notes = [periods_note, *notes, "mask token made up (0)", *drop_classifier(left)]
    biases = _take_biases(left, depth)
    if not biases and request.likely_arch(dims, depth).get("qkv_bias", True):
        biases = {block: state["mask_token"].new_zeros(3 * dims) for block in range(depth)}
        notes.append("qkv biases made up (0)")
    if biases:
        notes.append(add_masked_bias(state, biases))
    arch = {} if base is None else {"rope_base": float(base)}
    return Conversion({**state, **left}, arch, notes)


def to_timm(state_dict: Mapping[str, Tensor], *, qkv_bias: bool | None = None) -> dict[str, Tensor]:
    """Convert official ViT weights to timm's names.

    Bias masks are folded into the biases. The mask token, the RoPE periods, which timm computes
    exactly, and ``local_cls_norm``, which serves in training only, are left out.

    Args:
        state_dict: official names.
        qkv_bias: True writes q and v biases, for a ``qkvb`` model; False leaves them out, for a
            plain model; None writes them if the weights have a qkv bias.

    Raises:
        ValueError: If the model has a separate CLS norm, RMSNorm or an effective K bias, or
            ``qkv_bias=False`` would drop biases that are not zero.
    """
    refuse_special_norms(state_dict, "timm's DINOv3")
    swiglu = any(".mlp.w1." in name for name in state_dict)
    state, _ = _table(swiglu).to_foreign(state_dict)
    for block in range(num_blocks(state_dict)):
        biases = effective_bias(state_dict, block)
        zeros = torch.zeros_like(state_dict["cls_token"][0, 0])
        q, k, v = biases if biases is not None else (zeros,) * 3
        if k.any():
            raise ValueError(f"block {block} has an effective K bias, which timm cannot express")
        if qkv_bias or (qkv_bias is None and biases is not None):
            state[f"blocks.{block}.attn.q_bias"] = q
            state[f"blocks.{block}.attn.v_bias"] = v
        elif q.any() or v.any():
            raise ValueError(
                f"qkv_bias=False would drop q and v biases of block {block} that are not zero; "
                "convert for a qkvb model"
            )
    return {name: tensor.contiguous() for name, tensor in state.items()}


def drop_classifier(left: dict[str, Tensor]) -> list[str]:
    """Remove a classifier from ``left``; return notes for the report."""
    dropped = [left.pop(name) for name in _CLASSIFIER if name in left]
    return ["classifier head dropped"] if dropped else []


def _table(swiglu: bool) -> NameTable:
    return NameTable(_TOP, {**_BLOCK, **(_SWIGLU if swiglu else _MLP)})


def _take_biases(left: dict[str, Tensor], depth: int) -> dict[int, Tensor]:
    """Remove the q and v biases from ``left`` and return the fused bias (3 D,) by block."""
    biases = {}
    for block in range(depth):
        names = [f"blocks.{block}.attn.{part}_bias" for part in "qv"]
        if all(name in left for name in names):
            q, v = (left.pop(name) for name in names)
            biases[block] = torch.cat((q, torch.zeros_like(q), v))
    return biases
