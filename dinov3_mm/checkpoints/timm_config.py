"""The JSON file that stands beside timm weights of a DINOv3 backbone."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..models.backbones.convnext_variants import CONVNEXT_ARCHITECTURES
from ..models.backbones.vit_variants import VIT_ARCHITECTURES
from ..models.backbones.zoo import ZOO
from ..models.layers import ffn_hidden_dims
from .hf_config import check_rope
from .statistics import Statistics
from .vit_architecture import arch_facts

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
