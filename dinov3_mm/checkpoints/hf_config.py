"""The JSON files that stand beside Hugging Face weights of a DINOv3 backbone."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..models.layers import ffn_hidden_dims
from .statistics import Statistics

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
