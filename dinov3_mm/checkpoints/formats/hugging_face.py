"""Hugging Face weights of ViT, ConvNeXt and DINOv2: names, and the JSON files beside them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov3_mm.checkpoints.locate import Statistics
from dinov3_mm.models.layers import ffn_hidden_dims

from .architecture import resampling_note
from .conversion import (
    PERIODS_KEY,
    Conversion,
    ConversionRequest,
    ConvNeXtNames,
    NameTable,
    add_masked_bias,
    effective_bias,
    made_up_periods,
    missing_scales,
    num_blocks,
    refuse_special_norms,
    with_bias,
    with_twin_norm,
    without_twin_norm,
)

# --- ``dinov3_vit``: separate q, k, v projections, other names, no periods ---


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


# --- ``dinov3_convnext``: other names, the final norm once ---


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


# --- ``dinov2`` and ``dinov2_with_registers``: separate q, k, v, other names ---
#
# The library knows two sets of names: the ones on disk, and those of version 5 in memory.


_ROOT = "encoder."
_DINOV2_TOP = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    **with_bias(
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("norm", "layernorm")
    ),
}
_DINOV2_BLOCK = {
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
_TABLE = NameTable(_DINOV2_TOP, _DINOV2_BLOCK, foreign_root="layer")
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
        _fuse_dinov2_qkv(state, left, block)
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


def _fuse_dinov2_qkv(state: dict[str, Tensor], left: dict[str, Tensor], block: int) -> None:
    """Move q, k and v of a block from ``left`` to ``state``."""
    for leaf in ("weight", "bias"):
        names = [f"layer.{block}.attention.attention.{part}.{leaf}" for part in _PARTS]
        if all(name in left for name in names):
            parts = [left.pop(name) for name in names]
            state[f"blocks.{block}.attn.qkv.{leaf}"] = torch.cat(parts)


# --- The JSON files beside weights of a DINOv3 backbone ---


_NORM_EPS = {"layernormbf16": 1e-5, "layernorm": 1e-6}
# Side of the square that the released processors resize to.
_IMAGE_SIZE = 224


def hf_vit_config(
    arch: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: str
) -> dict[str, Any]:
    """``config.json`` of a ``DINOv3ViTModel``.

    Args:
        arch: architecture settings of the backbone.
        tensors: its weights under Hugging Face names, which show the biases.
        dtype: of the weights, e.g. 'float32'.

    Raises:
        ValueError: If the library has no place for an architecture value.
    """
    check_rope(arch, "Hugging Face's DINOv3")
    gated = arch["ffn_layer"] != "mlp"
    bias = {part: f"layer.0.attention.{part}_proj.bias" in tensors for part in ("q", "k", "v", "o")}
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "dtype": dtype,
        "patch_size": arch["patch_size"],
        "hidden_size": arch["embed_dims"],
        "intermediate_size": ffn_hidden_dims(
            arch["ffn_layer"], arch["embed_dims"], arch["ffn_ratio"]
        ),
        "num_hidden_layers": arch["num_layers"],
        "num_attention_heads": arch["num_heads"],
        "hidden_act": "silu" if gated else "gelu",
        "use_gated_mlp": gated,
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": _NORM_EPS[arch["norm_layer"]],
        "layerscale_value": 1.0,
        "rope_theta": arch["rope_base"],
        "image_size": _IMAGE_SIZE,
        "num_channels": arch["in_channels"],
        "query_bias": bias["q"],
        "key_bias": bias["k"],
        "value_bias": bias["v"],
        "proj_bias": bias["o"],
        "mlp_bias": arch["ffn_bias"],
        "num_register_tokens": arch["num_registers"],
        "pos_embed_shift": None,
        "pos_embed_jitter": None,
        "pos_embed_rescale": 2.0,
    }


def hf_convnext_config(
    arch: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: str
) -> dict[str, Any]:
    """``config.json`` of a ``DINOv3ConvNextModel``; arguments as in :func:`hf_vit_config`."""
    return {
        "architectures": ["DINOv3ConvNextModel"],
        "model_type": "dinov3_convnext",
        "dtype": dtype,
        "num_channels": arch["in_channels"],
        "hidden_sizes": list(arch["dims"]),
        "depths": list(arch["depths"]),
        "hidden_act": "gelu",
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,
        "layer_scale_init_value": 1e-6,
        "drop_path_rate": 0.0,
        "image_size": _IMAGE_SIZE,
    }


def hf_preprocessor_config(statistics: Statistics) -> dict[str, Any]:
    """``preprocessor_config.json``: squash to 224 x 224, scale to [0, 1], normalise."""
    return {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "do_resize": True,
        "size": {"height": _IMAGE_SIZE, "width": _IMAGE_SIZE},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(statistics.mean),
        "image_std": list(statistics.std),
    }


def check_rope(arch: Mapping[str, Any], library: str) -> None:
    """Raise a ``ValueError`` for RoPE settings that neither Hugging Face nor timm can express."""
    if arch["rope_base"] is None or arch["rope_normalize_coords"] != "separate":
        raise ValueError(
            f"{library} has RoPE periods of a base and coordinates normalised per axis only; this "
            f"backbone has rope_base={arch['rope_base']} and "
            f"rope_normalize_coords={arch['rope_normalize_coords']!r}"
        )
