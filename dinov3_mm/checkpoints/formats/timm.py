"""timm weights of ViT, ConvNeXt and DINOv2: names, and the JSON file beside them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov3_mm.checkpoints.locate import Statistics
from dinov3_mm.models.backbones.zoo import CONVNEXT_ARCHITECTURES, VIT_ARCHITECTURES, ZOO
from dinov3_mm.models.layers import ffn_hidden_dims

from .architecture import arch_facts, resampling_note
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
from .hugging_face import check_rope

# --- ``vit_*_dinov3*``: split biases, other names, no mask token, no periods ---


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


# --- ``convnext_*.dinov3_*``: other names, the final norm in the head ---


_NAMES = ConvNeXtNames(
    stem="stem.{layer}",
    downsample="stages.{stage}.downsample.{layer}",
    block="stages.{stage}.blocks.{block}",
    parts={"dwconv": "conv_dw", "norm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"},
    norm="head.norm",
)
_CONVNEXT_CLASSIFIER = ("head.fc.weight", "head.fc.bias")


def timm_convnext_to_official(
    tensors: Mapping[str, Tensor], request: ConversionRequest
) -> Conversion:
    """Convert timm ConvNeXt weights; pointwise layers may be linear or 1 x 1 convolutions."""
    state, left = _NAMES.to_official(tensors)
    notes = []
    if [left.pop(name) for name in _CONVNEXT_CLASSIFIER if name in left]:
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


# --- ``vit_*_patch14_*dinov2*``: no mask token, CLS position folded in ---


_DINOV2_TOP = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "register_tokens": "reg_token",
    **with_bias(("patch_embed.proj", "patch_embed.proj"), ("norm", "norm")),
}
_DINOV2_BLOCK = {
    "ls1.gamma": "ls1.gamma",
    "ls2.gamma": "ls2.gamma",
    **with_bias(*((name, name) for name in ("norm1", "norm2", "attn.qkv", "attn.proj"))),
}
_DINOV2_SWIGLU = with_bias(("mlp.w12", "mlp.fc1"), ("mlp.w3", "mlp.fc2"))


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
    state, left = _dinov2_table(_is_gated(tensors)).to_official(tensors)
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
    state, _ = _dinov2_table("blocks.0.mlp.w12.weight" in state_dict).to_foreign(state_dict)
    if "reg_token" in state:
        positions = state["pos_embed"]
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]
    ones = torch.ones_like(state_dict["cls_token"][0, 0])
    for block in range(num_blocks(state_dict)):
        for scale in ("ls1", "ls2"):
            state.setdefault(f"blocks.{block}.{scale}.gamma", ones)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _dinov2_table(gated: bool) -> NameTable:
    return NameTable(_DINOV2_TOP, {**_DINOV2_BLOCK, **(_DINOV2_SWIGLU if gated else _MLP)})


def _is_gated(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the feed-forward is a SwiGLU, whose first matrix has two halves."""
    first, last = (tensors.get(f"blocks.0.mlp.fc{index}.weight") for index in (1, 2))
    return first is not None and last is not None and first.shape[0] == 2 * last.shape[1]


# --- The JSON file beside weights of a DINOv3 backbone ---


# Side of the square that timm's DINOv3 models state.
_IMAGE_SIZE = 256


def timm_vit_config(arch: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Name and arguments of the timm ViT that has a place for every tensor.

    Args:
        arch: architecture settings of the backbone.
        tensors: its weights under timm's names, which show the biases.

    Raises:
        ValueError: If timm has no place for an architecture value.
    """
    check_rope(arch, "timm's DINOv3")
    wanted = {"norm_layer": "layernormbf16", "proj_bias": True, "ffn_bias": True}
    other = [f"{key}={arch[key]!r}" for key, value in wanted.items() if arch[key] != value]
    if other:
        raise ValueError(f"timm's DINOv3 has no {', '.join(other)}; it has {wanted}")
    qkvb = "_qkvb" if "blocks.0.attn.q_bias" in tensors else ""
    for row in ZOO.values():
        table = VIT_ARCHITECTURES.get(row.arch)
        if row.timm_name and row.backbone == "DINOv3ViT" and _same_in_timm(arch, table):
            name = row.timm_name.partition(".")[0] + (qkvb if table["qkv_bias"] else "")
            return {"architecture": name, "model_args": {"global_pool": "token"}}
    size = "small" if arch["ffn_layer"] == "mlp" else "small_plus"
    dims = arch["embed_dims"]
    return {
        "architecture": f"vit_{size}_patch16_dinov3{qkvb}",
        "model_args": {
            "global_pool": "token",
            "embed_dim": dims,
            "depth": arch["num_layers"],
            "num_heads": arch["num_heads"],
            "patch_size": arch["patch_size"],
            "in_chans": arch["in_channels"],
            "mlp_ratio": ffn_hidden_dims(arch["ffn_layer"], dims, arch["ffn_ratio"]) / dims,
            "num_reg_tokens": arch["num_registers"],
            "rope_temperature": arch["rope_base"],
        },
    }


def timm_convnext_config(arch: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Name and arguments of the timm ConvNeXt; arguments as in :func:`timm_vit_config`."""
    sizes = {"depths": list(arch["depths"]), "dims": list(arch["dims"])}
    for name in ("tiny", "small", "base", "large"):
        row = CONVNEXT_ARCHITECTURES[name]
        if all(row[key] == value for key, value in sizes.items()) and arch["in_channels"] == 3:
            return {"architecture": f"convnext_{name}", "model_args": {}}
    return {
        "architecture": "convnext_tiny",
        "model_args": {**sizes, "in_chans": arch["in_channels"]},
    }


def timm_folder_config(
    model: Mapping[str, Any], num_features: int, statistics: Statistics | None, first_conv: str
) -> dict[str, Any]:
    """``config.json`` of a folder that ``timm.create_model('local-dir:FOLDER')`` builds from."""
    pretrained = {
        "custom_load": False,
        "input_size": [3, _IMAGE_SIZE, _IMAGE_SIZE],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "num_classes": 0,
        "first_conv": first_conv,
    }
    if statistics is not None:
        pretrained |= {"mean": list(statistics.mean), "std": list(statistics.std)}
    return {
        **model,
        "num_classes": 0,
        "num_features": num_features,
        "pretrained_cfg": pretrained,
    }


def _same_in_timm(arch: Mapping[str, Any], table: Mapping[str, Any]) -> bool:
    """Whether two architectures are one model to timm, which has no norm for local crops."""
    ignored = ("untie_global_and_local_cls_norm", "mask_k_bias")
    facts = [
        {key: value for key, value in arch_facts(each).items() if key not in ignored}
        for each in (arch, table)
    ]
    return facts[0] == facts[1] and arch["rope_base"] == table["rope_base"]
