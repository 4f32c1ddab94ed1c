"""Architectures by name, and the released checkpoints: one place for each number of a backbone."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dinov3_mm.errors import hint

# --- From a name or dict and arguments to every value ---


def resolve_arch(
    arch: str | Mapping[str, Any],
    table: Mapping[str, Mapping[str, Any]],
    *,
    sizes: tuple[str, ...],
    defaults: Mapping[str, Any],
    overrides: Mapping[str, Any],
    exclusive: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
) -> dict[str, Any]:
    """Return every value of an architecture: of a row of ``table``, or of a dict over defaults.

    Args:
        arch: name in ``table``, or a dict that states all ``sizes`` and any key of ``defaults``.
        table: architectures by name, each complete.
        sizes: keys without a default.
        defaults: values of the keys that a dict may leave out.
        overrides: explicit arguments by key; None means "as in ``arch``".
        exclusive: two groups of keys of which one is None; stating one withdraws the other.

    Raises:
        ValueError: for an unknown name or key, or a missing size.
    """
    if isinstance(arch, str):
        if arch not in table:
            raise ValueError(
                f"arch is {arch!r}; expected a dict or one of {', '.join(table)}; "
                f"{hint(arch, table)}"
            )
        settings = dict(table[arch])
    else:
        _check_keys(arch, sizes, defaults)
        settings = {size: arch[size] for size in sizes} | dict(defaults)
        _update(settings, arch, exclusive)
    explicit = {key: value for key, value in overrides.items() if value is not None}
    _update(settings, explicit, exclusive)
    return settings


def settle_transformer(settings: dict[str, Any], ffn_layers: tuple[str, ...]) -> dict[str, Any]:
    """The settings of a ViT after the checks that all families have in common.

    Args:
        settings: result of :func:`resolve_arch`.
        ffn_layers: feed-forwards that the family knows.

    Raises:
        ValueError: for another feed-forward, or heads that do not divide the width.
    """
    settings["layer_scale_init_value"] = float(settings["layer_scale_init_value"] or 0)
    if settings["ffn_layer"] not in ffn_layers:
        raise ValueError(f"ffn_layer is {settings['ffn_layer']!r}; expected one of {ffn_layers}")
    if settings["embed_dims"] % settings["num_heads"]:
        raise ValueError(
            f"embed_dims {settings['embed_dims']} is not a multiple of "
            f"num_heads {settings['num_heads']}"
        )
    return settings


def _check_keys(
    arch: Mapping[str, Any], sizes: tuple[str, ...], defaults: Mapping[str, Any]
) -> None:
    known = (*sizes, *defaults)
    for key in arch:
        if key not in known:
            raise ValueError(
                f"unknown key {key!r} in the arch dict; known keys are {', '.join(known)}; "
                f"{hint(key, known)}"
            )
    missing = [key for key in sizes if key not in arch]
    if missing:
        raise ValueError(f"the arch dict lacks {', '.join(missing)}; it has {', '.join(arch)}")


def _update(
    settings: dict[str, Any],
    changes: Mapping[str, Any],
    exclusive: tuple[tuple[str, ...], tuple[str, ...]],
) -> None:
    """Apply changes; a change that states one exclusive group alone withdraws the other."""
    stated = [any(changes.get(key) is not None for key in group) for group in exclusive]
    for group, is_stated, other in zip(exclusive, stated, reversed(stated), strict=True):
        if other and not is_stated:
            settings.update(dict.fromkeys(group))
    settings.update(changes)


# --- ViT ---


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


# --- ConvNeXt ---


CONVNEXT_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "layer_scale_init_value": 1e-6,
    "patch_size": None,
}


def _convnext(depths: list[int], dims: list[int]) -> dict[str, Any]:
    return {"depths": depths, "dims": dims, **CONVNEXT_DEFAULTS}


# Released (arXiv 2508.10104, section 5.2), with the sizes of arXiv 2201.03545.
CONVNEXT_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny": _convnext([3, 3, 9, 3], [96, 192, 384, 768]),
    "small": _convnext([3, 3, 27, 3], [96, 192, 384, 768]),
    "base": _convnext([3, 3, 27, 3], [128, 256, 512, 1024]),
    "large": _convnext([3, 3, 27, 3], [192, 384, 768, 1536]),
}
# As training configurations spell them.
for _name in tuple(CONVNEXT_ARCHITECTURES):
    CONVNEXT_ARCHITECTURES[f"convnext_{_name}"] = CONVNEXT_ARCHITECTURES[_name]


def resolve_convnext_arch(arch: str | dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return every architecture value of a ConvNeXt, from ``arch`` and explicit arguments.

    Args:
        arch: name in :data:`CONVNEXT_ARCHITECTURES`, or a dict with ``depths``, ``dims`` and any
            key of :data:`CONVNEXT_DEFAULTS`.
        overrides: explicit arguments by key; None means "as in ``arch``".

    Raises:
        ValueError: for an unknown name or key, a missing size, or sizes that are not four.
    """
    settings = resolve_arch(
        arch,
        CONVNEXT_ARCHITECTURES,
        sizes=("depths", "dims"),
        defaults=CONVNEXT_DEFAULTS,
        overrides=overrides,
    )
    for key in ("depths", "dims"):
        settings[key] = [int(value) for value in settings[key]]
        if len(settings[key]) != 4 or min(settings[key]) < 1:
            raise ValueError(f"{key} is {settings[key]}; expected one positive number per stage, 4")
    settings["layer_scale_init_value"] = float(settings["layer_scale_init_value"] or 0)
    return settings


# --- DINOv2 (arXiv 2304.07193, 2309.16588) ---


_SIZES = ("embed_dims", "num_layers", "num_heads")
_DINOV2_FFN_LAYERS = ("mlp", "swiglufused")

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
        _DINOV2_FFN_LAYERS,
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


# --- Checkpoints, and names like theirs ---
#
# One row a checkpoint: its files, its input statistics, its licence, its size.


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_SATELLITE = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
_DINOV3_LICENCE = "DINOv3 License"
_DINOV2_ADDRESS = "https://dl.fbaipublicfiles.com/dinov2"


class ZooRow(NamedTuple):
    """A checkpoint, or an architecture without one.

    Attributes:
        backbone: class name in the MODELS registry.
        arch: name of the architecture of that class.
        official_name: entry point of the official hub; its own name where there is none.
        data: pretraining data, e.g. 'LVD-1689M', or None without weights.
        file: official file name; None without weights.
        sha256_prefix: first hexadecimal digits of the file's SHA-256, where they are known.
        hf_id, timm_name: names of the same weights elsewhere, None where there are none.
        mean, std: statistics of input normalisation for images in [0, 1], RGB.
        licence: of the weights; None without weights.
        num_params: number of trainable values.
        gmacs: multiplications with addition per 224 px image, in units of 1e9: convolutions,
            matrix products and attention.
        released: whether the file can be had from its publisher.
        url: address of the file where it is public; None where access must be asked for.
    """

    backbone: str
    arch: str
    official_name: str
    data: str | None
    file: str | None
    sha256_prefix: str | None
    hf_id: str | None
    timm_name: str | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str | None
    num_params: int
    gmacs: float
    released: bool
    url: str | None = None


def _dinov3(
    backbone: str,
    arch: str,
    token: str,
    digits: str,
    timm: str | None,
    num_params: int,
    gmacs: float,
    data: str = "LVD-1689M",
) -> tuple[str, ZooRow]:
    tag = data.replace("-", "").lower()
    mean, std = _SATELLITE if data == "SAT-493M" else (IMAGENET_MEAN, IMAGENET_STD)
    stem = f"dinov3_{token}_pretrain_{tag}"
    row = ZooRow(
        backbone=backbone,
        arch=arch,
        official_name=f"dinov3_{token}",
        data=data,
        file=f"{stem}-{digits}.pth",
        sha256_prefix=digits,
        hf_id=f"facebook/{stem.replace('_', '-')}" if timm else None,
        timm_name=timm and timm.format(tag),
        mean=mean,
        std=std,
        licence=_DINOV3_LICENCE,
        num_params=num_params,
        gmacs=gmacs,
        released=timm is not None,
    )
    return f"dinov3_{token}_{tag}", row


def _vit_row(
    arch: str, token: str, digits: str, timm: str | None, num_params: int, gmacs: float, **data: str
) -> tuple[str, ZooRow]:
    timm = timm and f"vit_{timm}_patch16_dinov3.{{}}"
    return _dinov3("DINOv3ViT", arch, token, digits, timm, num_params, gmacs, **data)


def _convnext_row(arch: str, digits: str, num_params: int, gmacs: float) -> tuple[str, ZooRow]:
    token, timm = f"convnext_{arch}", f"convnext_{arch}.dinov3_{{}}"
    return _dinov3("DINOv3ConvNeXt", arch, token, digits, timm, num_params, gmacs)


def _dinov2(arch: str, letter: str, num_params: int, gmacs: float) -> tuple[str, ZooRow]:
    size, _, registers = arch.partition("_")
    token = f"dinov2_vit{letter}14"
    file = f"{token}{'_reg4' if registers else ''}_pretrain.pth"
    name = f"{token}_reg" if registers else token
    row = ZooRow(
        backbone="DINOv2ViT",
        arch=arch,
        official_name=name,
        data="LVD-142M",
        file=file,
        sha256_prefix=None,
        hf_id=f"facebook/dinov2-{'with-registers-' if registers else ''}{size}",
        timm_name=f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        licence="Apache-2.0",
        num_params=num_params,
        gmacs=gmacs,
        released=True,
        url=f"{_DINOV2_ADDRESS}/{token}/{file}",
    )
    return name, row


def _unreleased(arch: str, name: str, num_params: int, gmacs: float) -> tuple[str, ZooRow]:
    row = ZooRow(
        backbone="DINOv3ViT",
        arch=arch,
        official_name=name,
        data=None,
        file=None,
        sha256_prefix=None,
        hf_id=None,
        timm_name=None,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        licence=None,
        num_params=num_params,
        gmacs=gmacs,
        released=False,
    )
    return name, row


ZOO: dict[str, ZooRow] = dict(
    [
        _vit_row("small", "vits16", "08c60483", "small", 21_601_152, 4.7),
        _vit_row("small_plus", "vits16plus", "4057cbaa", "small_plus", 28_697_472, 6.12),
        _vit_row("base", "vitb16", "73cec8be", "base", 85_669_632, 17.93),
        _vit_row("large", "vitl16", "8aa4cbdd", "large", 303_154_176, 62.84),
        _vit_row("large_sat", "vitl16", "eadcf0ff", "large", 303_156_224, 62.84, data="SAT-493M"),
        _vit_row("large_plus", "vitl16plus", "46503df0", None, 403_915_776, 83.07),
        _vit_row("huge_plus", "vith16plus", "7c1da9a5", "huge_plus", 840_633_600, 172.11),
        _vit_row("7b", "vit7b16", "a955f4ea", "7b", 6_716_043_264, 1362.74),
        _vit_row("7b", "vit7b16", "a6675841", "7b", 6_716_043_264, 1362.74, data="SAT-493M"),
        _convnext_row("tiny", "21b726bb", 27_820_128, 4.45),
        _convnext_row("small", "296db49d", 49_454_688, 8.68),
        _convnext_row("base", "801f2ba9", 87_566_464, 15.35),
        _convnext_row("large", "61fa432d", 196_230_336, 34.36),
        _dinov2("small", "s", 22_056_576, 6.12),
        _dinov2("base", "b", 86_580_480, 23.16),
        _dinov2("large", "l", 304_368_640, 81.01),
        _dinov2("giant", "g", 1_136_480_768, 299.39),
        _dinov2("small_reg", "s", 22_058_112, 6.23),
        _dinov2("base_reg", "b", 86_583_552, 23.54),
        _dinov2("large_reg", "l", 304_372_736, 82.32),
        _dinov2("giant_reg", "g", 1_136_486_912, 304.17),
        _unreleased("tiny", "dinov3_vitt16", 5_492_160, 1.28),
        _unreleased("so400m", "dinov3_vitso400m16", 415_411_200, 85.91),
        _unreleased("huge2", "dinov3_vithuge2_16", 630_754_560, 129.96),
        _unreleased("giant2", "dinov3_vitgiant2_16", 1_134_577_152, 232.82),
    ]
)


def zoo_row(name: str) -> ZooRow | None:
    """Row of a zoo name or of an official hub name, which stands for the web images."""
    if name in ZOO:
        return ZOO[name]
    return next((row for row in ZOO.values() if row.official_name == name), None)
