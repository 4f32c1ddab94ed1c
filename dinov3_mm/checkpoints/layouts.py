"""The table of layouts: how each is recognised and converted to official names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .conversion import Conversion, ConversionRequest
from .hf_vit import hf_to_official
from .official_vit import official_to_official
from .timm_vit import timm_to_official
from .vit_architecture import describe_vit_mismatch, infer_vit_arch


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
LAYOUTS = (
    Layout(
        "official",
        "official",
        VIT,
        (("rope_embed.periods",), ("storage_tokens",), ("blocks.0.ls1.gamma",)),
        official_to_official,
    ),
    Layout(
        "hf",
        "Hugging Face",
        VIT,
        (("embeddings.patch_embeddings.weight",),),
        hf_to_official,
    ),
    Layout("timm", "timm", VIT, (("reg_token", "blocks.0.gamma_1"),), timm_to_official),
)
