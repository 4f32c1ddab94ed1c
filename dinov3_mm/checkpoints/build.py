"""Backbones by name or from a weight file, for plain Python."""

import inspect
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS

from dinov3_mm.errors import hint
from dinov3_mm.models.backbones.timm_backbone import FeatureMapBackbone
from dinov3_mm.models.backbones.zoo import ZOO, zoo_row

from .containers import open_checkpoint, read_export_header
from .install import install_weights
from .load import ForeignCheckpoint, load_weights
from .locate import is_url, parse_hub_name


def list_backbones(pattern: str | None = None, *, weights_only: bool = False) -> list[str]:
    """Names that :func:`build_backbone` takes, sorted.

    Args:
        pattern: shell pattern that the names match.
        weights_only: leave out architectures whose weights cannot be had from their publisher.

    Example:
        >>> list_backbones("*sat493m")
        ['dinov3_vit7b16_sat493m', 'dinov3_vitl16_sat493m']
    """
    return sorted(
        name
        for name, row in ZOO.items()
        if (row.released or not weights_only) and (pattern is None or fnmatchcase(name, pattern))
    )


def build_backbone(
    name_or_file: str | os.PathLike,
    weights: str | os.PathLike | None = None,
    *,
    periods: str = "file",
    reset_bias_mask: bool = False,
    allow_partial: bool = False,
    inflate: str | None = None,
    **overrides: Any,
) -> BaseModule:
    """Build a backbone in eval mode.

    Args:
        name_or_file: a name of :func:`list_backbones` (``dinov3_vitl16_sat493m``) or of the
            official hub (``dinov3_vitl16``), or a weight file, folder, URL or Hugging Face hub name
            (``owner/name``) of any known format, whose architecture is read from its metadata or
            from its tensors.
        weights: for a name, the weights to load; without them the backbone is initialised randomly.
        periods: see :func:`load_weights`.
        reset_bias_mask: see :func:`load_weights`.
        allow_partial: load the tensors that fit and initialise the others randomly; the logged line
            names them.
        inflate: with ``in_channels=...`` in the overrides: rule by which the weights are adapted
            to that number of image channels; see :func:`load_backbone_weights`.
        **overrides: arguments of the backbone, e.g. ``out_indices``.

    Raises:
        FileNotFoundError: If there are no such weights.
        TypeError: If the backbone has no such argument, or for ``arch``, which a name and a file
            have of their own.
        ValueError: If the name is unknown, or the weights cannot be read or do not fit.
    """
    if "arch" in overrides:
        raise TypeError(_refuse_arch(name_or_file, overrides["arch"]))
    options = {"periods": periods, "reset_bias_mask": reset_bias_mask}
    installing = {"allow_partial": allow_partial, "inflate": inflate}
    row = zoo_row(str(name_or_file))
    if row is not None:
        if weights is None and reset_bias_mask:
            raise ValueError("reset_bias_mask=True needs weights; a fresh backbone has 1/0/1")
        if weights is None and inflate is not None:
            raise ValueError(f"inflate={inflate!r} adapts weights; give weights, or leave it out")
        return _from_name(row.backbone, row.arch, weights, options, installing, overrides)
    _check_file(name_or_file)
    if weights is not None:
        raise ValueError(
            f"{name_or_file} is a weight file already; pass a name to load other weights {weights}"
        )
    adapter = build_adapter(name_or_file, overrides)
    if adapter is not None:
        return adapter
    checkpoint = load_weights(name_or_file, **options)
    return build_from_checkpoint(checkpoint, checkpoint.arch, **installing, **overrides)


def _refuse_arch(name_or_file: str | os.PathLike, arch: object) -> str:
    """What to say to somebody who names an architecture beside what has one."""
    row = zoo_row(os.fspath(name_or_file))
    if row is not None:
        return (
            f"{name_or_file} is a name, which stands for an architecture ({row.backbone}, "
            f"{row.arch!r}): leave arch={arch!r} out. An architecture of your own is built with "
            f"MODELS.build(dict(type={row.backbone!r}, arch=...))"
        )
    return (
        f"the architecture of {name_or_file} is read from the file itself: leave arch={arch!r} "
        "out. To load it into the architecture of a name, use build_backbone(NAME, weights=FILE); "
        "into one of your own, MODELS.build(dict(type='DINOv3ViT', arch=..., "
        "init_cfg=dict(type='DINOv3Pretrained', checkpoint=FILE)))"
    )


def _check_file(name_or_file: str | os.PathLike) -> None:
    if is_url(name_or_file) or parse_hub_name(name_or_file):
        return
    if Path(name_or_file).expanduser().exists():
        return
    name = os.fspath(name_or_file)
    known = [*ZOO, *dict.fromkeys(row.official_name for row in ZOO.values())]
    message = f"{name} is neither a known backbone nor a local file; {hint(name, known)}"
    raise FileNotFoundError(message) if os.sep in name or Path(name).suffix else ValueError(message)


def _from_name(
    backbone: str,
    arch: str,
    weights: str | os.PathLike | None,
    options: dict[str, Any],
    installing: dict[str, Any],
    overrides: dict[str, Any],
) -> BaseModule:
    if weights is None:
        module = _build(backbone, arch, overrides)
        module.init_weights()
        return module.eval()
    settings = MODELS.get(backbone).arch_zoo[arch]
    wanted = {**settings, **{key: overrides[key] for key in settings if key in overrides}}
    checkpoint = load_weights(weights, arch=wanted, **options)
    # An official name covers files with and without this norm.
    untie = "untie_global_and_local_cls_norm"
    if untie in settings and "local_cls_norm.weight" in checkpoint.state_dict:
        overrides = {untie: True, **overrides}
    return build_from_checkpoint(checkpoint, arch, **installing, **overrides)


def build_from_checkpoint(
    checkpoint: ForeignCheckpoint,
    arch: str | dict[str, Any],
    *,
    allow_partial: bool = False,
    inflate: str | None = None,
    **overrides: Any,
) -> BaseModule:
    """Build a backbone of architecture ``arch`` with loaded weights; see :func:`build_backbone`."""
    module = _build(checkpoint.layout.family.backbone, arch, overrides)
    if allow_partial:
        module.init_weights()
    install_weights(module, checkpoint, allow_partial=allow_partial, inflate=inflate)
    return module.eval()


def _build(backbone: str, arch: str | dict[str, Any], overrides: dict[str, Any]) -> BaseModule:
    """A backbone of this class and architecture; arguments that it lacks are refused."""
    known = inspect.signature(MODELS.get(backbone)).parameters
    for key in overrides:
        if key not in known:
            known = [name for name in known if name != "arch"]
            raise TypeError(f"{backbone} has no argument {key!r}; {hint(key, known)}")
    return MODELS.build(dict(type=backbone, arch=arch, **overrides))


def build_adapter(
    path: str | os.PathLike, overrides: Mapping[str, Any] | None = None
) -> BaseModule | None:
    """The backbone of an export of ``TimmBackbone`` or ``FeatureMapBackbone``, in eval mode.

    Args:
        path: weight file, or folder of several.
        overrides: arguments to change, of which such a backbone takes none.

    Returns:
        None for any other file.

    Raises:
        ImportError: the library of the network is not installed.
        TypeError: overrides were given.
        ValueError: the tensors are not the network's.
    """
    path = Path(path).expanduser()
    header = read_export_header(path)
    adapter = MODELS.get(header["backbone"]) if header else None
    if adapter is None or not issubclass(adapter, FeatureMapBackbone):
        return None
    if overrides:
        raise TypeError(f"{path} is a {header['backbone']}, whose arguments cannot be changed")
    backbone = adapter(**header["arch"])
    opened = open_checkpoint(path)
    try:
        backbone.foreign_module.load_state_dict(opened.read(opened.names), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the network that it names: {error}") from None
    return backbone.eval()
