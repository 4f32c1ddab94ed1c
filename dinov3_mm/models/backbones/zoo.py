"""The checkpoints that were released, and the architectures that can be asked for by a like name.

One row a checkpoint: its files, its input statistics, its licence, its size.
"""

from typing import NamedTuple

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


def _vit(
    arch: str, token: str, digits: str, timm: str | None, num_params: int, gmacs: float, **data: str
) -> tuple[str, ZooRow]:
    timm = timm and f"vit_{timm}_patch16_dinov3.{{}}"
    return _dinov3("DINOv3ViT", arch, token, digits, timm, num_params, gmacs, **data)


def _convnext(arch: str, digits: str, num_params: int, gmacs: float) -> tuple[str, ZooRow]:
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
        _vit("small", "vits16", "08c60483", "small", 21_601_152, 4.7),
        _vit("small_plus", "vits16plus", "4057cbaa", "small_plus", 28_697_472, 6.12),
        _vit("base", "vitb16", "73cec8be", "base", 85_669_632, 17.93),
        _vit("large", "vitl16", "8aa4cbdd", "large", 303_154_176, 62.84),
        _vit("large_sat", "vitl16", "eadcf0ff", "large", 303_156_224, 62.84, data="SAT-493M"),
        _vit("large_plus", "vitl16plus", "46503df0", None, 403_915_776, 83.07),
        _vit("huge_plus", "vith16plus", "7c1da9a5", "huge_plus", 840_633_600, 172.11),
        _vit("7b", "vit7b16", "a955f4ea", "7b", 6_716_043_264, 1362.74),
        _vit("7b", "vit7b16", "a6675841", "7b", 6_716_043_264, 1362.74, data="SAT-493M"),
        _convnext("tiny", "21b726bb", 27_820_128, 4.45),
        _convnext("small", "296db49d", 49_454_688, 8.68),
        _convnext("base", "801f2ba9", 87_566_464, 15.35),
        _convnext("large", "61fa432d", 196_230_336, 34.36),
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
