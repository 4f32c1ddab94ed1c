"""Hugging Face ``dinov2`` and ``dinov2_with_registers`` weights: separate q, k, v, other names.

The library knows two sets of names: the ones on disk, and those of version 5 in memory.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.layers import ffn_hidden_dims
from .conversion import Conversion, ConversionRequest
from .dinov2_architecture import resampling_note
from .hf_vit import norm_of_eps
from .naming import NameTable, num_blocks, with_bias

_ROOT = "encoder."
_TOP = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    **with_bias(
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("norm", "layernorm")
    ),
}
_BLOCK = {
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    **with_bias(
        ("norm1", "norm1"),
        ("norm2", "norm2"),
        ("attn.proj", "attention.output.dense"),
        ("mlp.fc1", "mlp.fc1"),
        ("mlp.fc2", "mlp.fc2"),
        ("mlp.w12", "mlp.weights_in"),
        ("mlp.w3", "mlp.weights_out"),
    ),
}
_TABLE = NameTable(_TOP, _BLOCK, foreign_root="layer")
_PARTS = ("query", "key", "value")
_ON_DISK = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.down_proj.": ".mlp.weights_out.",
}


def hf_dinov2_to_official(tensors: Mapping[str, Tensor], request: ConversionRequest) -> Conversion:
    """Convert Hugging Face DINOv2 weights, under the names on disk or in memory.

    The library resamples the position embedding to the wanted size, with a low-pass filter in the
    models with registers and without one in the others; the backbone does the same.

    Raises:
        ValueError: If the number of heads cannot be told, or the configuration states an epsilon
            that no DINOv2 has.
    """
    tensors = _names_on_disk({name.removeprefix(_ROOT): t for name, t in tensors.items()})
    state, left = _TABLE.to_official(tensors)
    for block in range(num_blocks(left, root="layer")):
        _fuse_qkv(state, left, block)
    has_registers = "register_tokens" in state
    if has_registers and state["register_tokens"].numel() == 0:
        del state["register_tokens"]
    dims = state["pos_embed"].shape[-1]
    head_dims, notes = request.head_dims(dims, num_blocks(state))
    arch = {
        "num_heads": dims // head_dims,
        "interpolate_offset": 0.0,
        "interpolate_antialias": has_registers,
    }
    if request.config.get("layer_norm_eps") is not None:
        arch["norm_layer"] = norm_of_eps(request.config["layer_norm_eps"], "DINOv2")
    if "mask_token" not in state:
        state["mask_token"] = state["pos_embed"].new_zeros(1, dims)
        notes.append("mask token made up (0)")
    notes.append(resampling_note(arch, request))
    return Conversion({**state, **left}, arch, notes)


def dinov2_to_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert official DINOv2 weights to the names that Hugging Face writes to disk.

    The result belongs to ``Dinov2WithRegistersModel`` if there are registers, else to
    ``Dinov2Model``. A model without LayerScale gets factors of 1.

    Raises:
        ValueError: If the model has RMSNorm.
    """
    if "norm.bias" not in state_dict:
        raise ValueError("Hugging Face's DINOv2 has no RMSNorm; only LayerNorm can be converted")
    state, _ = _TABLE.to_foreign(state_dict)
    for block in range(num_blocks(state_dict)):
        for leaf in ("weight", "bias"):
            fused = state_dict.get(f"blocks.{block}.attn.qkv.{leaf}")
            for part, tensor in zip(_PARTS, () if fused is None else fused.chunk(3)):
                state[f"layer.{block}.attention.attention.{part}.{leaf}"] = tensor
        for scale in ("layer_scale1", "layer_scale2"):
            ones = torch.ones_like(state_dict["cls_token"][0, 0])
            state.setdefault(f"layer.{block}.{scale}.lambda1", ones)
    return {
        (_ROOT + name if name.startswith("layer.") else name): tensor.contiguous()
        for name, tensor in state.items()
    }


def hf_dinov2_config(
    arch: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: str
) -> dict[str, Any]:
    """``config.json`` of the model that :func:`dinov2_to_hf` makes weights for.

    Args:
        arch: architecture settings of the backbone.
        tensors: its weights under Hugging Face names.
        dtype: of the weights, e.g. 'float32'.

    Raises:
        ValueError: If no whole ``ffn_ratio``, the only ones that the library takes, gives the
            hidden width.
    """
    registers = arch["num_registers"]
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    return {
        "architectures": [f"{name}Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "dtype": dtype,
        "hidden_size": arch["embed_dims"],
        "num_hidden_layers": arch["num_layers"],
        "num_attention_heads": arch["num_heads"],
        "mlp_ratio": _whole_ratio(arch),
        "use_swiglu_ffn": arch["ffn_layer"] != "mlp",
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6 if arch["norm_layer"] == "layernorm" else 1e-5,
        "layerscale_value": 1.0,
        "image_size": arch["img_size"],
        "patch_size": arch["patch_size"],
        "num_channels": arch["in_channels"],
        "qkv_bias": arch["qkv_bias"],
        **({"num_register_tokens": registers} if registers else {}),
    }


def _whole_ratio(arch: Mapping[str, Any]) -> int:
    layer, dims, ratio = arch["ffn_layer"], arch["embed_dims"], arch["ffn_ratio"]
    hidden = ffn_hidden_dims(layer, dims, ratio)
    for whole in (math.floor(ratio), math.ceil(ratio)):
        if ffn_hidden_dims(layer, dims, whole) == hidden:
            return whole
    raise ValueError(
        f"Hugging Face's DINOv2 takes whole numbers as mlp_ratio, and none gives the hidden width "
        f"{hidden} of this backbone (embed_dims {dims}, ffn_ratio {ratio})"
    )


def _names_on_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that the library writes to disk."""
    renamed = {}
    for name, tensor in tensors.items():
        for memory, disk in _ON_DISK.items():
            name = name.replace(memory, disk)
        renamed[name] = tensor
    for name in [name for name in renamed if ".mlp.gate_proj." in name]:
        other = name.replace(".gate_proj.", ".up_proj.")
        if other in renamed:  # strict loading names what is missing
            halves = torch.cat((renamed.pop(name), renamed.pop(other)))
            renamed[name.replace(".gate_proj.", ".weights_in.")] = halves
    return renamed


def _fuse_qkv(state: dict[str, Tensor], left: dict[str, Tensor], block: int) -> None:
    """Move q, k and v of a block from ``left`` to ``state``."""
    for leaf in ("weight", "bias"):
        names = [f"layer.{block}.attention.attention.{part}.{leaf}" for part in _PARTS]
        if all(name in left for name in names):
            parts = [left.pop(name) for name in names]
            state[f"blocks.{block}.attn.qkv.{leaf}"] = torch.cat(parts)
