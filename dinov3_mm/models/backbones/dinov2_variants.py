"""The DINOv2 architectures that can be asked for by name (arXiv 2304.07193, 2309.16588)."""

from typing import Any

from .architecture import resolve_arch, settle_transformer

_SIZES = ("embed_dims", "num_layers", "num_heads")
_FFN_LAYERS = ("mlp", "swiglufused")

# What every released model without registers has in common.
DINOV2_DEFAULTS: dict[str, Any] = {
    "patch_size": 14,
    "in_channels": 3,
    "img_size": 518,
    "num_registers": 0,
    "ffn_layer": "mlp",
    "ffn_ratio": 4.0,
    "qkv_bias": True,
    "ffn_bias": True,
    "proj_bias": True,
    "layer_scale_init_value": 1e-5,
    "norm_layer": "layernorm",
    "interpolate_offset": 0.1,
    "interpolate_antialias": False,
}
# The models with registers resample their position embedding in another way.
DINOV2_REGISTERS: dict[str, Any] = {
    "num_registers": 4,
    "interpolate_offset": 0.0,
    "interpolate_antialias": True,
}
_RELEASED = {
    "small": {"embed_dims": 384, "num_layers": 12, "num_heads": 6},
    "base": {"embed_dims": 768, "num_layers": 12, "num_heads": 12},
    "large": {"embed_dims": 1024, "num_layers": 24, "num_heads": 16},
    "giant": {"embed_dims": 1536, "num_layers": 40, "num_heads": 24, "ffn_layer": "swiglufused"},
}
DINOV2_ARCHITECTURES: dict[str, dict[str, Any]] = {
    name + suffix: {**DINOV2_DEFAULTS, **changes, **sizes}
    for suffix, changes in (("", {}), ("_reg", DINOV2_REGISTERS))
    for name, sizes in _RELEASED.items()
}


def resolve_dinov2_arch(arch: str | dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return every architecture value of a DINOv2 ViT, from ``arch`` and explicit arguments.

    Args:
        arch: name in :data:`DINOV2_ARCHITECTURES`, or a dict with ``embed_dims``, ``num_layers``,
            ``num_heads`` and any key of :data:`DINOV2_DEFAULTS`.
        overrides: explicit arguments by key; None means "as in ``arch``".

    Raises:
        ValueError: for an unknown name or key, a missing size, or values that do not fit.
    """
    settings = settle_transformer(
        resolve_arch(
            arch,
            DINOV2_ARCHITECTURES,
            sizes=_SIZES,
            defaults=DINOV2_DEFAULTS,
            overrides=overrides,
        ),
        _FFN_LAYERS,
    )
    if settings["img_size"] % settings["patch_size"]:
        raise ValueError(
            f"img_size {settings['img_size']} is not a multiple of patch_size "
            f"{settings['patch_size']}; it is the size that the position embedding was made for"
        )
    if not 0 <= settings["interpolate_offset"] < 1:
        raise ValueError(
            f"interpolate_offset is {settings['interpolate_offset']}; expected 0, or 0.1 as in the "
            "released models without registers"
        )
    return settings
