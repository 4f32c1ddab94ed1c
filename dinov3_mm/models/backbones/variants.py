"""The architectures that can be asked for by name, and the checkpoints that were released.

One table for each: :data:`ARCHITECTURES` holds shapes, :data:`ZOO` holds files and their metadata.
"""

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

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

ARCHITECTURES: dict[str, dict[str, Any]] = {
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
    ARCHITECTURES[f"vit_{_name}"] = ARCHITECTURES[_name]
ARCHITECTURES["vit_7b"] = _vit(4096, 40, 32, ffn_ratio=3.0)

_WEB = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SATELLITE = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))


class ReleasedBackbone(NamedTuple):
    """A released checkpoint.

    Attributes:
        backbone: class name in the MODELS registry.
        arch: name in :data:`ARCHITECTURES`.
        official_name: entry point of the official hub.
        file: official file name; its last eight digits begin the file's SHA-256.
        hf_id, timm_name: names of the same weights elsewhere, None where there are none.
        mean, std: statistics of input normalisation for images in [0, 1], RGB.
        num_params: number of trainable values.
        released: False for a row whose file the official code names but does not publish.
    """

    backbone: str
    arch: str
    official_name: str
    file: str
    hf_id: str | None
    timm_name: str | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_params: int
    released: bool = True

    @property
    def weights(self) -> str:
        """Name of the pretraining data: 'LVD1689M' or 'SAT493M'."""
        return self.file.rsplit("-", 1)[0].rsplit("_", 1)[1].upper()

    @property
    def sha256_prefix(self) -> str:
        """The first eight hexadecimal digits of the official file's SHA-256."""
        return self.file.rsplit("-", 1)[1].removesuffix(".pth")


def _vit_row(
    arch: str, token: str, digits: str, timm: str | None, num_params: int, data: str = "lvd1689m"
) -> tuple[str, ReleasedBackbone]:
    mean, std = _SATELLITE if data == "sat493m" else _WEB
    row = ReleasedBackbone(
        backbone="DINOv3ViT",
        arch=arch,
        official_name=f"dinov3_{token}",
        file=f"dinov3_{token}_pretrain_{data}-{digits}.pth",
        hf_id=f"facebook/dinov3-{token}-pretrain-{data}" if timm else None,
        timm_name=f"{timm}_patch16_dinov3.{data}" if timm else None,
        mean=mean,
        std=std,
        num_params=num_params,
        released=timm is not None,
    )
    return f"dinov3_{token}_{data}", row


ZOO: dict[str, ReleasedBackbone] = dict(
    [
        _vit_row("small", "vits16", "08c60483", "vit_small", 21_601_152),
        _vit_row("small_plus", "vits16plus", "4057cbaa", "vit_small_plus", 28_697_472),
        _vit_row("base", "vitb16", "73cec8be", "vit_base", 85_669_632),
        _vit_row("large", "vitl16", "8aa4cbdd", "vit_large", 303_154_176),
        _vit_row("large_sat", "vitl16", "eadcf0ff", "vit_large", 303_156_224, "sat493m"),
        _vit_row("large_plus", "vitl16plus", "46503df0", None, 403_915_776),
        _vit_row("huge_plus", "vith16plus", "7c1da9a5", "vit_huge_plus", 840_633_600),
        _vit_row("7b", "vit7b16", "a955f4ea", "vit_7b", 6_716_043_264),
        _vit_row("7b", "vit7b16", "a6675841", "vit_7b", 6_716_043_264, "sat493m"),
    ]
)


def nearest_name(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` with the known name closest to ``name``; empty if none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def resolve_vit_arch(arch: str | dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return every architecture value of a ViT, from ``arch`` and explicit arguments.

    Args:
        arch: name in :data:`ARCHITECTURES`, or a dict with ``embed_dims``, ``num_layers``,
            ``num_heads`` and any key of :data:`VIT_DEFAULTS`.
        overrides: explicit arguments by key; None means "as in ``arch``".

    Raises:
        ValueError: for an unknown name or key, or a missing size.
    """
    explicit = {key: value for key, value in overrides.items() if value is not None}
    if isinstance(arch, str):
        if arch not in ARCHITECTURES:
            raise ValueError(
                f"arch is {arch!r}{nearest_name(arch, ARCHITECTURES)}; "
                f"expected a dict or one of {', '.join(ARCHITECTURES)}"
            )
        settings = dict(ARCHITECTURES[arch])
    else:
        settings = _check_arch_dict(arch)
    _update(settings, explicit)
    settings["layer_scale_init_value"] = float(settings["layer_scale_init_value"] or 0)
    if settings["embed_dims"] % settings["num_heads"]:
        raise ValueError(
            f"embed_dims {settings['embed_dims']} is not a multiple of "
            f"num_heads {settings['num_heads']}"
        )
    return settings


def _check_arch_dict(arch: dict[str, Any]) -> dict[str, Any]:
    sizes = ("embed_dims", "num_layers", "num_heads")
    known = (*sizes, *VIT_DEFAULTS)
    for key in arch:
        if key not in known:
            raise ValueError(
                f"unknown key {key!r} in the arch dict{nearest_name(key, known)}; "
                f"known keys are {', '.join(known)}"
            )
    missing = [key for key in sizes if key not in arch]
    if missing:
        raise ValueError(f"the arch dict lacks {', '.join(missing)}; it has {', '.join(arch)}")
    settings = {**{size: arch[size] for size in sizes}, **VIT_DEFAULTS}
    _update(settings, arch)
    return settings


def _update(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    """Apply changes; stating one form of the RoPE periods withdraws the other."""
    periods = ("rope_min_period", "rope_max_period")
    states_base = changes.get("rope_base") is not None
    states_periods = any(changes.get(key) is not None for key in periods)
    if states_periods and not states_base:
        settings["rope_base"] = None
    if states_base and not states_periods:
        settings.update(dict.fromkeys(periods))
    settings.update(changes)
