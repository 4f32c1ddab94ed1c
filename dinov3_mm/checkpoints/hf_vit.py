"""Hugging Face ``dinov3_vit`` weights: separate q, k, v projections, other names, no periods."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .conversion import Conversion, ConversionRequest
from .naming import NameTable, num_blocks, with_bias
from .official_vit import refuse_special_norms
from .periods import PERIODS_KEY, made_up_periods
from .qkv_bias import add_masked_bias, effective_bias

_TOP = {
    "cls_token": "embeddings.cls_token",
    "storage_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    **with_bias(("patch_embed.proj", "embeddings.patch_embeddings"), ("norm", "norm")),
}
_BLOCK = {
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    **with_bias(("norm1", "norm1"), ("norm2", "norm2"), ("attn.proj", "attention.o_proj")),
}
_MLP = with_bias(("mlp.fc1", "mlp.up_proj"), ("mlp.fc2", "mlp.down_proj"))
_GATED = with_bias(
    ("mlp.w1", "mlp.gate_proj"), ("mlp.w2", "mlp.up_proj"), ("mlp.w3", "mlp.down_proj")
)
_NORM_OF_EPS = {1e-5: "layernormbf16", 1e-6: "layernorm"}


def hf_to_official(tensors: Mapping[str, Tensor], request: ConversionRequest) -> Conversion:
    """Convert Hugging Face ViT weights, under the names on disk or in memory (``model.layer``).

    The K bias becomes zero behind a bias mask, and the RoPE periods are computed.

    Raises:
        ValueError: If the q, k and v of a block do not fit together, or the configuration states
            what no DINOv3 has.
    """
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    gated = any(".mlp.gate_proj." in name for name in tensors)
    state, left = _table(gated).to_official(tensors)
    mask_token = state.get("mask_token")
    if mask_token is not None and mask_token.ndim == 3:
        state["mask_token"] = mask_token.flatten(0, 1)
    if "storage_tokens" in state and state["storage_tokens"].numel() == 0:
        del state["storage_tokens"]
    notes = _fuse_qkv(state, left)
    dims = state["patch_embed.proj.weight"].shape[0]
    head_dims, head_notes = request.head_dims(dims, num_blocks(state))
    periods, periods_note = made_up_periods(head_dims, request, request.config.get("rope_theta"))
    state[PERIODS_KEY] = periods
    return Conversion(
        {**state, **left}, _stated(request.config), [periods_note, *head_notes, *notes]
    )


def to_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert official ViT weights to the names that Hugging Face writes to disk.

    Bias masks are folded into the biases. The RoPE periods, which the library computes exactly, and
    ``local_cls_norm``, which serves in training only, are left out.

    Raises:
        ValueError: If the model has a separate CLS norm or RMSNorm.
    """
    refuse_special_norms(state_dict, "Hugging Face's DINOv3")
    gated = any(".mlp.w1." in name for name in state_dict)
    state, _ = _table(gated).to_foreign(state_dict)
    cls_token = state_dict["cls_token"]
    state["embeddings.mask_token"] = state_dict["mask_token"][None]
    state.setdefault("embeddings.register_tokens", cls_token[:, :0])
    for block in range(num_blocks(state_dict)):
        _split_qkv(state_dict, state, block)
        for scale in ("layer_scale1", "layer_scale2"):
            state.setdefault(f"layer.{block}.{scale}.lambda1", torch.ones_like(cls_token[0, 0]))
    return {name: tensor.contiguous() for name, tensor in state.items()}


def norm_of_eps(eps: float, family: str) -> str:
    """Name of the LayerNorm with this epsilon; a ``ValueError`` if there is none."""
    if eps not in _NORM_OF_EPS:
        raise ValueError(f"layer_norm_eps is {eps}; {family} has {sorted(_NORM_OF_EPS)}")
    return _NORM_OF_EPS[eps]


def _table(gated: bool) -> NameTable:
    return NameTable(_TOP, {**_BLOCK, **(_GATED if gated else _MLP)}, foreign_root="layer")


def _fuse_qkv(state: dict[str, Tensor], left: dict[str, Tensor]) -> list[str]:
    """Move the q, k, v projections from ``left`` to ``state``; return notes for the report."""
    biases: dict[int, Tensor] = {}
    any_k_bias = any(name.endswith(".attention.k_proj.bias") for name in left)
    for block in range(num_blocks(left, root="layer")):
        names = [f"layer.{block}.attention.{part}_proj" for part in "qkv"]
        if not all(f"{name}.weight" in left for name in names):
            continue  # strict loading names what is missing
        weights = [left.pop(f"{name}.weight") for name in names]
        if len({tuple(weight.shape) for weight in weights}) > 1:
            shapes = [tuple(weight.shape) for weight in weights]
            raise ValueError(f"{names[0]}, k_proj, v_proj have different shapes: {shapes}")
        state[f"blocks.{block}.attn.qkv.weight"] = torch.cat(weights)
        stored = [left.pop(f"{name}.bias", None) for name in names]
        if any(bias is not None for bias in stored):
            absent = weights[0].new_zeros(weights[0].shape[0])
            biases[block] = torch.cat([absent if bias is None else bias for bias in stored])
    if any_k_bias:
        state.update({f"blocks.{block}.attn.qkv.bias": bias for block, bias in biases.items()})
        return ["K bias present, no bias mask"]
    return [add_masked_bias(state, biases)] if biases else []


def _split_qkv(official: Mapping[str, Tensor], state: dict[str, Tensor], block: int) -> None:
    weights = official[f"blocks.{block}.attn.qkv.weight"].chunk(3)
    biases = effective_bias(official, block)
    masked = f"blocks.{block}.attn.qkv.bias_mask" in official
    for index, part in enumerate("qkv"):
        name = f"layer.{block}.attention.{part}_proj"
        state[f"{name}.weight"] = weights[index]
        if biases is not None and not (part == "k" and masked and not biases[index].any()):
            state[f"{name}.bias"] = biases[index]


def _stated(config: Mapping) -> dict:
    """Architecture values that the configuration states and the tensors do not show."""
    arch = {}
    if config.get("rope_theta") is not None:
        arch["rope_base"] = float(config["rope_theta"])
    if config.get("layer_norm_eps") is not None:
        arch["norm_layer"] = norm_of_eps(config["layer_norm_eps"], "DINOv3")
    return arch
