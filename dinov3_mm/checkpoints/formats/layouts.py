"""The table of layouts: how each is recognised and converted to official names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .architecture import (
    describe_convnext_mismatch,
    describe_dinov2_mismatch,
    describe_vit_mismatch,
    infer_convnext_arch,
    infer_dinov2_arch,
    infer_vit_arch,
    official_dinov2_to_official,
)
from .conversion import (
    Conversion,
    ConversionRequest,
    official_convnext_to_official,
    official_to_official,
)
from .hugging_face import hf_convnext_to_official, hf_dinov2_to_official, hf_to_official
from .timm import timm_convnext_to_official, timm_dinov2_to_official, timm_to_official


@dataclass(frozen=True)
class Family:
    """What the official tensors of one kind of backbone say.

    Attributes:
        backbone: class name in the MODELS registry.
        infer_arch: architecture dict for that class.
        describe_mismatch: how the tensors differ from an architecture dict, in words.
    """

    backbone: str
    infer_arch: Callable[[Mapping[str, Tensor]], dict[str, Any]]
    describe_mismatch: Callable[[Mapping[str, Tensor], Mapping[str, Any]], str]


@dataclass(frozen=True)
class Layout:
    """Whose names the tensors of a backbone carry.

    Attributes:
        name: 'official', 'hf' or 'timm'.
        title: the same in words.
        family: kind of backbone.
        signatures: sets of names; any one that is complete shows the layout.
        to_official: conversion of the tensors.
    """

    name: str
    title: str
    family: Family
    signatures: tuple[tuple[str, ...], ...]
    to_official: Callable[[dict[str, Tensor], ConversionRequest], Conversion]


VIT = Family("DINOv3ViT", infer_vit_arch, describe_vit_mismatch)
DINOV2 = Family("DINOv2ViT", infer_dinov2_arch, describe_dinov2_mismatch)
CONVNEXT = Family("DINOv3ConvNeXt", infer_convnext_arch, describe_convnext_mismatch)
_OFFICIAL_VIT = Layout(
    "official",
    "official",
    VIT,
    (("rope_embed.periods",), ("storage_tokens",)),
    official_to_official,
)
# In the order in which they are tried: timm's DINOv2 names differ from the official ones by what
# they lack, and LayerScale alone shows a DINOv3 only if there is no position embedding.
LAYOUTS = (
    _OFFICIAL_VIT,
    Layout(
        "official",
        "official DINOv2",
        DINOV2,
        (("pos_embed", "mask_token", "patch_embed.proj.weight"),),
        official_dinov2_to_official,
    ),
    Layout(
        "timm",
        "timm DINOv2",
        DINOV2,
        (("pos_embed", "blocks.0.ls1.gamma"),),
        timm_dinov2_to_official,
    ),
    Layout(
        "hf",
        "Hugging Face DINOv2",
        DINOV2,
        (("embeddings.position_embeddings", "encoder.layer.0.layer_scale1.lambda1"),),
        hf_dinov2_to_official,
    ),
    replace(_OFFICIAL_VIT, signatures=(("blocks.0.ls1.gamma",),)),
    Layout(
        "hf",
        "Hugging Face",
        VIT,
        (("embeddings.patch_embeddings.weight",),),
        hf_to_official,
    ),
    Layout("timm", "timm", VIT, (("reg_token", "blocks.0.gamma_1"),), timm_to_official),
    Layout(
        "official",
        "official ConvNeXt",
        CONVNEXT,
        (("downsample_layers.0.0.weight",),),
        official_convnext_to_official,
    ),
    Layout(
        "hf",
        "Hugging Face ConvNeXt",
        CONVNEXT,
        (
            ("stages.0.downsample_layers.0.weight", "layer_norm.weight"),
            ("model.stages.0.downsample_layers.0.weight", "layer_norm.weight"),
        ),
        hf_convnext_to_official,
    ),
    Layout(
        "timm",
        "timm ConvNeXt",
        CONVNEXT,
        (("stem.0.weight", "stages.0.blocks.0.conv_dw.weight"),),
        timm_convnext_to_official,
    ),
)
