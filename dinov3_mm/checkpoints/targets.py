"""The formats that a backbone can be converted to: what they hold, how they are written."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from safetensors.torch import save_file
from torch import Tensor

from dinov3_mm.checkpoints.formats.conversion import PERIODS_KEY
from dinov3_mm.checkpoints.formats.hugging_face import (
    convnext_to_hf,
    dinov2_to_hf,
    hf_convnext_config,
    hf_preprocessor_config,
    hf_vit_config,
)
from dinov3_mm.checkpoints.formats.hugging_face import (
    to_hf as vit_to_hf,
)
from dinov3_mm.checkpoints.formats.timm import (
    convnext_to_timm,
    dinov2_to_timm,
    timm_convnext_config,
    timm_folder_config,
    timm_vit_config,
)
from dinov3_mm.checkpoints.formats.timm import (
    to_timm as vit_to_timm,
)

from .export import export_backbone
from .io import atomic_write
from .load import select_backbone
from .locate import Statistics

# --- Official weights under the names of other libraries ---


# By class name in the MODELS registry.
TO_HF = {
    "DINOv3ViT": vit_to_hf,
    "DINOv3ConvNeXt": convnext_to_hf,
    "DINOv2ViT": dinov2_to_hf,
}
TO_TIMM = {
    "DINOv3ViT": vit_to_timm,
    "DINOv3ConvNeXt": convnext_to_timm,
    "DINOv2ViT": dinov2_to_timm,
}


def to_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert official weights to the names that Hugging Face writes to disk.

    Of a ViT, bias masks are folded into the biases; the RoPE periods, which the library computes
    exactly, and ``local_cls_norm``, which serves in training only, are left out. ConvNeXts lose
    nothing.

    Raises:
        ValueError: If these are not the official names of a backbone, or the library has no place
            for the model.
    """
    return _converter(TO_HF, state_dict, "Hugging Face")(state_dict)


def to_timm(state_dict: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Convert official weights to timm's names.

    Of a ViT, bias masks are folded into the biases; the mask token, the RoPE periods, which timm
    computes exactly, and ``local_cls_norm``, which serves in training only, are left out. ConvNeXts
    lose nothing.

    Args:
        state_dict: official names.
        **options: for a ViT ``qkv_bias``: True writes q and v biases, for a ``qkvb`` model; False
            leaves them out, for a plain model; None (default) writes them if there is a qkv bias.
            For a ConvNeXt ``conv_mlp``: True writes pointwise weights as 1 x 1 convolutions.

    Raises:
        TypeError: If the kind of backbone has no such option.
        ValueError: If these are not the official names of a backbone, or the library has no place
            for the model.
    """
    return _converter(TO_TIMM, state_dict, "timm")(state_dict, **options)


def _converter(
    table: Mapping[str, Callable[..., dict[str, Tensor]]],
    state_dict: Mapping[str, Tensor],
    library: str,
) -> Callable[..., dict[str, Tensor]]:
    selection = select_backbone(state_dict, "the state dict")
    if selection.layout.name != "official" or selection.prefix:
        raise ValueError(
            f"the state dict has {selection.layout.title} names under {selection.prefix!r}; "
            "expected the official names of a backbone, as load_weights returns them"
        )
    kind = selection.layout.family.backbone
    if kind not in table:
        raise ValueError(f"{kind} cannot be converted to {library}; {' and '.join(table)} can")
    return table[kind]


# --- Formats to write ---


# What a format has no place for: pattern of official names, reason.
Losses = tuple[tuple[str, str], ...]

_TRAINING_ONLY = ("local_cls_norm.*", "serves in training only")
_HF_VIT: Losses = (
    (PERIODS_KEY, "computed by the library"),
    ("blocks.*.attn.qkv.bias_mask", "folded into the biases"),
    _TRAINING_ONLY,
)
_TIMM_VIT: Losses = (*_HF_VIT, ("mask_token", "serves in training only"))
_CONVNEXT: Losses = (("norms.3.*", "the same tensors as norm"),)


@dataclass(frozen=True)
class Source:
    """A backbone about to be written.

    Attributes:
        backbone: the backbone, in eval mode.
        state_dict: its tensors under official names, in the dtype to write.
        statistics: its input normalisation, None if it is unknown.
        provenance: where it comes from, for formats that have a place for it.
    """

    backbone: BaseModule
    state_dict: dict[str, Tensor]
    statistics: Statistics | None
    provenance: dict[str, Any]

    @property
    def kind(self) -> str:
        """Class name in the MODELS registry."""
        return type(self.backbone).__name__

    @property
    def arch(self) -> dict[str, Any]:
        """Architecture settings."""
        return self.backbone.arch_settings


@dataclass(frozen=True)
class Target:
    """A format to convert to.

    Attributes:
        name: as users type it.
        suffix: of the file; None for a folder.
        write: writes a :class:`Source` to a path, returns notes about what was made up.
        usage: Python that loads the result, with ``{path}``.
        losses: what has no place in the format, by kind of backbone.
        computes_periods: whether the library that reads it computes the RoPE periods itself.
    """

    name: str
    suffix: str | None
    write: Callable[[Source, Path], list[str]]
    usage: str
    losses: Mapping[str, Losses]
    computes_periods: bool

    def dropped(self, names: list[str], kind: str) -> dict[str, tuple[str, list[str]]]:
        """What has no place: reason and official names by pattern."""
        found = {
            pattern: (reason, [name for name in names if fnmatchcase(name, pattern)])
            for pattern, reason in self.losses.get(kind, ())
        }
        return {pattern: entry for pattern, entry in found.items() if entry[1]}


def write_official(source: Source, path: Path) -> list[str]:
    """Write a flat dict by ``torch.save``, as the released files are.

    The periods are stored in bf16, as there, where that loses nothing.
    """
    tensors = _copies(source.state_dict)
    periods = tensors.get(PERIODS_KEY)
    if periods is not None and torch.equal(periods.bfloat16().to(periods.dtype), periods):
        tensors[PERIODS_KEY] = periods.bfloat16()
    with atomic_write(path) as partial:
        torch.save(tensors, partial)
    return []


def write_mm(source: Source, path: Path) -> list[str]:
    """Write our own safetensors; see :func:`export_backbone`."""
    with torch.device("meta"):
        backbone = MODELS.build(dict(type=source.kind, arch=source.arch))
    state_dict = dict(source.state_dict)
    if PERIODS_KEY in state_dict:
        state_dict[PERIODS_KEY] = state_dict[PERIODS_KEY].float()
    backbone.load_state_dict(state_dict, assign=True)
    statistics = source.statistics
    metadata: dict[str, Any] = {"provenance": source.provenance}
    if statistics is not None:
        metadata["statistics"] = {"mean": statistics.mean, "std": statistics.std}
    export_backbone(backbone, path, metadata)
    return []


def write_hf(source: Source, folder: Path) -> list[str]:
    """Write a folder for ``transformers``: configurations and ``model.safetensors``."""
    convert, config = _of_kind(_HF, source.kind, "Hugging Face")
    tensors = convert(source.state_dict)
    dtype = str(_dtype(tensors)).removeprefix("torch.")
    _write_json(folder / "config.json", config(source.arch, tensors, dtype))
    if source.statistics is not None:
        preprocessor = hf_preprocessor_config(source.statistics)
        _write_json(folder / "preprocessor_config.json", preprocessor)
    save_file(_copies(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return [] if source.arch["layer_scale_init_value"] else ["layer scales (1)"]


def write_timm(source: Source, folder: Path) -> list[str]:
    """Write a folder for ``timm``: ``config.json`` and ``model.safetensors``."""
    convert, config, first_conv = _of_kind(_TIMM, source.kind, "timm")
    tensors = convert(source.state_dict)
    made_up = []
    if not source.arch["layer_scale_init_value"]:
        made_up.append("layer scales (1)")
        if source.kind == "DINOv3ViT":
            ones = torch.ones(source.arch["embed_dims"], dtype=_dtype(tensors))
            for block in range(source.arch["num_layers"]):
                tensors |= {f"blocks.{block}.gamma_{index}": ones for index in (1, 2)}
    model = config(source.arch, tensors)
    width = source.backbone.num_features
    _write_json(
        folder / "config.json", timm_folder_config(model, width, source.statistics, first_conv)
    )
    save_file(_copies(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return made_up


TARGETS = {
    target.name: target
    for target in (
        Target(
            "official",
            ".pth",
            write_official,
            'torch.hub.load("FOLDER OF dinov3_mm", NAME, source="local", weights="{path}")',
            {},
            computes_periods=False,
        ),
        Target(
            "hf",
            None,
            write_hf,
            'transformers.AutoModel.from_pretrained("{path}")',
            {"DINOv3ViT": _HF_VIT, "DINOv3ConvNeXt": _CONVNEXT},
            computes_periods=True,
        ),
        Target(
            "timm",
            None,
            write_timm,
            'timm.create_model("local-dir:{path}", pretrained=True)',
            {"DINOv3ViT": _TIMM_VIT, "DINOv3ConvNeXt": _CONVNEXT},
            computes_periods=True,
        ),
        Target(
            "mm",
            ".safetensors",
            write_mm,
            'dinov3_mm.build_backbone("{path}")',
            {},
            computes_periods=False,
        ),
    )
}
_HF = {
    "DINOv3ViT": (TO_HF["DINOv3ViT"], hf_vit_config),
    "DINOv3ConvNeXt": (TO_HF["DINOv3ConvNeXt"], hf_convnext_config),
}
_TIMM = {
    "DINOv3ViT": (TO_TIMM["DINOv3ViT"], timm_vit_config, "patch_embed.proj"),
    "DINOv3ConvNeXt": (TO_TIMM["DINOv3ConvNeXt"], timm_convnext_config, "stem.0"),
}


def _of_kind(table: Mapping[str, tuple], kind: str, library: str) -> tuple:
    if kind not in table:
        raise ValueError(f"{kind} cannot be converted to {library}; {' and '.join(table)} can")
    return table[kind]


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Parts of a fused tensor would each be stored with the whole of it.
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of the largest tensor."""
    return max(tensors.values(), key=Tensor.numel).dtype


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
