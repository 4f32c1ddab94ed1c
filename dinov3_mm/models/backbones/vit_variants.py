"""The ViT architectures that can be asked for by name."""

from typing import Any

from .architecture import resolve_arch, settle_transformer

_FFN_LAYERS = ("mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128")

# What every released ViT has in common.
VIT_DEFAULTS: dict[str, Any] = {
    "patch_size": 16,
    "in_channels": 3,
    "num_registers": 4,
    "ffn_layer": "mlp",
    "ffn_ratio": 4.0,
    "qkv_bias": True,
    "mask_k_bias": True,
    "ffn_bias": True,
    "proj_bias": True,
    "layer_scale_init_value": 1e-5,
    "norm_layer": "layernormbf16",
    "untie_cls_and_patch_norms": False,
    "untie_global_and_local_cls_norm": False,
    "rope_base": 100.0,
    "rope_min_period": None,
    "rope_max_period": None,
    "rope_normalize_coords": "separate",
    "rope_dtype": "fp32",
}


def _vit(embed_dims: int, num_layers: int, num_heads: int, **changes: Any) -> dict[str, Any]:
    return {
        "embed_dims": embed_dims,
        "num_layers": num_layers,
        "num_heads": num_heads,
        **VIT_DEFAULTS,
        **changes,
    }


_SWIGLU_PLUS = {"ffn_layer": "swiglu", "ffn_ratio": 6.0}

VIT_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny": _vit(192, 12, 3),  # not released; for small experiments
    # Released (arXiv 2508.10104 and its model card).
    "small": _vit(384, 12, 6),
    "small_plus": _vit(384, 12, 6, **_SWIGLU_PLUS),
    "base": _vit(768, 12, 12),
    "large": _vit(1024, 24, 16),
    "large_sat": _vit(1024, 24, 16, untie_global_and_local_cls_norm=True),
    "large_plus": _vit(1024, 24, 16, **_SWIGLU_PLUS),
    "huge_plus": _vit(1280, 32, 20, **_SWIGLU_PLUS),
    "7b": _vit(
        4096,
        40,
        32,
        ffn_layer="swiglu64",
        ffn_ratio=3.0,
        qkv_bias=False,
        untie_global_and_local_cls_norm=True,
    ),
    # Named by the training configurations only.
    "so400m": _vit(1152, 27, 18, ffn_ratio=3.777777778),
    "huge2": _vit(1280, 32, 20),
    "giant2": _vit(1536, 40, 24),
}
# A training configuration names width, depth, heads and ratio, and states the rest itself; so
# 'vit_7b' is the plain MLP with biases until the configuration says otherwise, unlike '7b'.
for _name in ("tiny", "small", "base", "large", "so400m", "huge2", "giant2"):
    VIT_ARCHITECTURES[f"vit_{_name}"] = VIT_ARCHITECTURES[_name]
VIT_ARCHITECTURES["vit_7b"] = _vit(4096, 40, 32, ffn_ratio=3.0)


def resolve_vit_arch(arch: str | dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return every architecture value of a ViT, from ``arch`` and explicit arguments.

    Args:
        arch: name in :data:`VIT_ARCHITECTURES`, or a dict with ``embed_dims``, ``num_layers``,
            ``num_heads`` and any key of :data:`VIT_DEFAULTS`.
        overrides: explicit arguments by key; None means "as in ``arch``".

    Raises:
        ValueError: for an unknown name or key, or a missing size.
    """
    settings = resolve_arch(
        arch,
        VIT_ARCHITECTURES,
        sizes=("embed_dims", "num_layers", "num_heads"),
        defaults=VIT_DEFAULTS,
        overrides=overrides,
        exclusive=(("rope_base",), ("rope_min_period", "rope_max_period")),
    )
    return settle_transformer(settings, _FFN_LAYERS)
