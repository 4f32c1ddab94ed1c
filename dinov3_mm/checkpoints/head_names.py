"""Names of the tensors of every kind of head, in released files and here."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dinov3_mm.errors import hint

# --- One kind of head file ---


StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class HeadNames:
    """How the tensors of one kind of head file are called here.

    Attributes:
        to_ours: state dict of a file under the names of our module, without what belongs to other
            modules (backbone, aliases). Names that it does not know it passes on, so that the load
            can refuse them.
        to_released: the inverse, for :func:`export_head`; None where there is none.
        released: names of the released files of this kind. Each ends in the beginning of its
            SHA-256.
    """

    to_ours: Callable[[StateDict], dict[str, Tensor]]
    to_released: Callable[[StateDict], dict[str, Tensor]] | None = None
    released: tuple[str, ...] = ()


def head_names(kind: str) -> HeadNames:
    """The names of a kind of head.

    Raises:
        ValueError: if there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of head; {hint(str(kind), KINDS)}")
    return KINDS[kind]


# --- Classification: one linear layer ---


_LINEAR_HEAD, _LAYER = "linear_head.", "fc."
_BACKBONE = "backbone."
_NAMES = ("weight", "bias")


def linear_classifier_to_ours(state_dict: StateDict) -> dict[str, Tensor]:
    """Names of the file, or of the assembled official model, to those of ``LinearClsHead``."""
    kept = {
        name.removeprefix(_LINEAR_HEAD): tensor
        for name, tensor in state_dict.items()
        if not name.startswith(_BACKBONE)
    }
    return {_LAYER + name if name in _NAMES else name: tensor for name, tensor in kept.items()}


def linear_classifier_to_released(state_dict: StateDict) -> dict[str, Tensor]:
    """Names of ``LinearClsHead`` to those of the file."""
    return {name.removeprefix(_LAYER): tensor for name, tensor in state_dict.items()}


_CLASSIFICATION = {
    "linear_classifier": HeadNames(
        to_ours=linear_classifier_to_ours,
        to_released=linear_classifier_to_released,
        released=("dinov3_vit7b16_imagenet1k_linear_head-90d8ed92.pth",),
    )
}


# --- Segmentation: linear heads of the official trainer (``model_final.pth``) ---


# Stage 1 of the official model is the head, stage 0 the backbone, which the trainer leaves out.
_SEGMENTATION_HEAD, _SEGMENTATION_BACKBONE = "segmentation_model.1.", "segmentation_model.0."
_RENAMED = {"batchnorm_layer": "bn", "conv": "conv_seg"}


def linear_segmentation_to_ours(state_dict: StateDict) -> dict[str, Tensor]:
    """Official names, with or without the prefix of the assembled model, to ``decode_head``'s."""
    kept = {
        name.removeprefix(_SEGMENTATION_HEAD): tensor
        for name, tensor in state_dict.items()
        if not name.startswith(_SEGMENTATION_BACKBONE)
    }
    return _segmentation_renamed(kept, _RENAMED)


def linear_segmentation_to_released(state_dict: StateDict) -> dict[str, Tensor]:
    """Our names to those of the official trainer, with the prefix of the assembled model."""
    official = _segmentation_renamed(
        state_dict, {ours: theirs for theirs, ours in _RENAMED.items()}
    )
    return {_SEGMENTATION_HEAD + name: tensor for name, tensor in official.items()}


def _segmentation_renamed(state_dict: StateDict, modules: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state_dict.items():
        module, dot, rest = name.partition(".")
        renamed[modules.get(module, module) + dot + rest] = tensor
    return renamed


_SEGMENTATION = {
    "linear_segmentation": HeadNames(
        to_ours=linear_segmentation_to_ours, to_released=linear_segmentation_to_released
    )
}


# --- Segmentation: the released Mask2Former, adapter and head in one file ---
#
# Stage 0 of the official model is the adapter around its backbone, stage 1 the head. The adapter
# has the official names here too; the head is made of mmdet's modules, which have theirs.


_ADAPTER, _MASK2FORMER_HEAD = "segmentation_model.0.", "segmentation_model.1."

# Official name and mmdet's; {i} stands for an index and both end at a dot. First match wins.
_PIXEL_LAYER = "pixel_decoder.encoder.encoder.layers.{i}."
_OUR_PIXEL_LAYER = "pixel_decoder.encoder.layers.{i}."
_OUR_LAYER = "transformer_decoder.layers.{i}."
_MODULES = {
    "pixel_decoder.input_convs.{i}.0.": "pixel_decoder.input_convs.{i}.conv.",
    "pixel_decoder.input_convs.{i}.1.": "pixel_decoder.input_convs.{i}.gn.",
    "pixel_decoder.lateral_convs.{i}.norm.": "pixel_decoder.lateral_convs.{i}.gn.",
    "pixel_decoder.lateral_convs.{i}.": "pixel_decoder.lateral_convs.{i}.conv.",
    "pixel_decoder.output_convs.{i}.norm.": "pixel_decoder.output_convs.{i}.gn.",
    "pixel_decoder.output_convs.{i}.": "pixel_decoder.output_convs.{i}.conv.",
    "pixel_decoder.encoder.level_encoding": "pixel_decoder.level_encoding.weight",
    _PIXEL_LAYER + "self_attn.": _OUR_PIXEL_LAYER + "self_attn.",
    _PIXEL_LAYER + "norm1.": _OUR_PIXEL_LAYER + "norms.0.",
    _PIXEL_LAYER + "norm2.": _OUR_PIXEL_LAYER + "norms.1.",
    _PIXEL_LAYER + "linear1.": _OUR_PIXEL_LAYER + "ffn.layers.0.0.",
    _PIXEL_LAYER + "linear2.": _OUR_PIXEL_LAYER + "ffn.layers.1.",
    "predictor.transformer_cross_attention_layers.{i}.multihead_attn.": _OUR_LAYER
    + "cross_attn.attn.",
    "predictor.transformer_cross_attention_layers.{i}.norm.": _OUR_LAYER + "norms.0.",
    "predictor.transformer_self_attention_layers.{i}.self_attn.": _OUR_LAYER + "self_attn.attn.",
    "predictor.transformer_self_attention_layers.{i}.norm.": _OUR_LAYER + "norms.1.",
    "predictor.transformer_ffn_layers.{i}.linear1.": _OUR_LAYER + "ffn.layers.0.0.",
    "predictor.transformer_ffn_layers.{i}.linear2.": _OUR_LAYER + "ffn.layers.1.",
    "predictor.transformer_ffn_layers.{i}.norm.": _OUR_LAYER + "norms.2.",
    "predictor.post_norm.": "transformer_decoder.post_norm.",
    "predictor.query_feat.": "query_feat.",
    "predictor.query_embed.": "query_embed.",
    "predictor.level_embed.": "level_embed.",
    "predictor.class_embed.": "cls_embed.",
    "predictor.mask_embed.layers.0.": "mask_embed.0.",
    "predictor.mask_embed.layers.1.": "mask_embed.2.",
    "predictor.mask_embed.layers.2.": "mask_embed.4.",
}


def _rules(modules: dict[str, str]) -> list[tuple[re.Pattern, str]]:
    return [
        (re.compile(re.escape(given).replace(r"\{i\}", r"(\d+)")), wanted.replace("{i}", r"\g<1>"))
        for given, wanted in modules.items()
    ]


_TO_OURS = _rules(_MODULES)
_TO_RELEASED = _rules({ours: official for official, ours in _MODULES.items()})


def mask2former_to_ours(state_dict: StateDict) -> dict[str, Tensor]:
    """The head of a segmentor's file under the names of ``decode_head``."""
    kept = _without(state_dict, _ADAPTER)
    return {
        _mask2former_renamed(name.removeprefix(_MASK2FORMER_HEAD), _TO_OURS): t
        for name, t in kept.items()
    }


def mask2former_to_released(state_dict: StateDict) -> dict[str, Tensor]:
    """Our ``decode_head`` under official names, with the prefix of the assembled model."""
    return {
        _MASK2FORMER_HEAD + _mask2former_renamed(name, _TO_RELEASED): tensor
        for name, tensor in state_dict.items()
    }


def adapter_to_ours(state_dict: StateDict) -> dict[str, Tensor]:
    """The adapter of a segmentor's file, without its backbone, which has a file of its own."""
    kept = {
        name.removeprefix(_ADAPTER): t
        for name, t in _without(state_dict, _MASK2FORMER_HEAD).items()
    }
    return _without(kept, _BACKBONE)


def adapter_to_released(state_dict: StateDict) -> dict[str, Tensor]:
    """``adapter.own_modules()`` with the prefix of the assembled official model."""
    return {_ADAPTER + name: tensor for name, tensor in state_dict.items()}


def _without(state_dict: StateDict, prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith(prefix)}


def _mask2former_renamed(name: str, rules: list[tuple[re.Pattern, str]]) -> str:
    """A name by the first rule that fits its beginning; unknown names stay what they are."""
    for pattern, replacement in rules:
        match = pattern.match(name)
        if match:
            return match.expand(replacement) + name[match.end() :]
    return name


_names = partial(HeadNames, released=("dinov3_vit7b16_ade20k_m2f_head-bf307cb1.pth",))
_MASK2FORMER = {
    "mask2former": _names(to_ours=mask2former_to_ours, to_released=mask2former_to_released),
    "mask2former_adapter": _names(to_ours=adapter_to_ours, to_released=adapter_to_released),
}


# --- Depth: the released DPT decoders, linear heads of the official trainer ---
#
# :class:`DINOv3DPTDepthHead` and :class:`DINOv3LinearDepthHead` carry the official names. Files
# hold the decoder alone; a whole depth model has it under ``decoder.``, beside the backbone.


_DECODER = "decoder."
_BACKBONES = ("encoder.", "backbone.")
_BN = "reassemble_blocks.batchnorm_layers."
_OUTPUT = "conv_depth."
_BN_EPS = 1e-5


def depth_to_ours(state_dict: StateDict) -> dict[str, Tensor]:
    """The decoder's tensors, of a file with or without the rest of the model."""
    return {
        name.removeprefix(_DECODER): tensor
        for name, tensor in state_dict.items()
        if not name.startswith(_BACKBONES)
    }


def depth_to_released(state_dict: StateDict) -> dict[str, Tensor]:
    """The names of the files, which are ours."""
    return dict(state_dict)


def dpt_to_mmseg(state_dict: StateDict) -> dict[str, Tensor]:
    """A released DPT decoder as the trunk of mmseg's ``DPTHead`` (``norm_cfg=None``).

    The batch norms of the input go into the convolutions behind them, with their running
    statistics; the output layers, of which mmseg has none, are left out. The fused features, what
    ``DPTHead`` computes before ``cls_seg``, are those of the decoder in eval mode.

    Raises:
        ValueError: for a decoder with biases in its residual units or without the projection after
            fusion, as that of the canopy-height model, which ``DPTHead`` cannot express.
    """
    released = depth_to_ours(state_dict)
    if "project.conv.weight" not in released or any(
        "res_conv_unit" in name and name.endswith(".bias") for name in released
    ):
        raise ValueError(
            "mmseg's DPTHead has no biases in its residual units and always a projection after "
            "fusion; use DINOv3DPTDepthHead for this decoder"
        )
    trunk = {n: t for n, t in released.items() if not n.startswith((_BN, _OUTPUT))}
    for level in range(4):
        norm = f"{_BN}{level}."
        if f"{norm}weight" not in released:
            continue
        conv = f"reassemble_blocks.projects.{level}.conv."
        weight, bias = trunk[f"{conv}weight"], trunk[f"{conv}bias"]
        scale = released[f"{norm}weight"] / torch.sqrt(released[f"{norm}running_var"] + _BN_EPS)
        shift = released[f"{norm}bias"] - released[f"{norm}running_mean"] * scale
        trunk[f"{conv}weight"] = weight * scale[:, None, None]
        trunk[f"{conv}bias"] = bias + weight[:, :, 0, 0] @ shift
    return trunk


_DEPTH = {
    "linear_depth": HeadNames(to_ours=depth_to_ours, to_released=depth_to_released),
    "dpt_depth": HeadNames(
        to_ours=depth_to_ours,
        to_released=depth_to_released,
        released=(
            "dinov3_vit7b16_synthmix_dpt_head-02040be1.pth",
            "dinov3_vitl16_chmv2_dpt_head-3703d643.pth",
        ),
    ),
}


# --- Detection: the released detector's head ---
#
# The file holds the tensors under the names of :class:`DINOv3PlainDETRHead`, except those of the
# encoder, which is mmdet's here. It may also hold the backbone, and a second copy of
# ``class_embed`` and ``bbox_embed`` inside the decoder, where the original code shares them.


_ALIAS = re.compile(r"transformer\.decoder\.((?:class|bbox)_embed\..+)")
_ENCODER = re.compile(r"(transformer\.encoder\.layers\.\d+)\.(.+)")
# Released name in an encoder layer -> mmdet's.
_ENCODER_NAMES = {
    "self_attn.": "self_attn.attn.",
    "linear1.": "ffn.layers.0.0.",
    "linear2.": "ffn.layers.1.",
    "norm1.": "norms.0.",
    "norm2.": "norms.1.",
}


def detector_to_ours(state_dict: StateDict) -> dict[str, Tensor]:
    """Tensors of a released file under the names of :class:`DINOv3PlainDETRHead`.

    Tensors of the backbone are left out. Copies inside the decoder are left out, or stand in for
    tensors that the file holds there only.

    Raises:
        ValueError: if a copy is another tensor than its original.
    """
    ours, copies = {}, {}
    for name, tensor in state_dict.items():
        if alias := _ALIAS.fullmatch(name):
            copies[alias[1]] = tensor
        elif not name.startswith(_BACKBONE):
            ours[_detector_renamed(name, _ENCODER_NAMES)] = tensor
    different = [
        name for name, copy in copies.items() if name in ours and not torch.equal(copy, ours[name])
    ]
    if different:
        raise ValueError(
            f"{len(different)} tensors differ from their copies in the decoder, which must be the "
            f"same: {', '.join(different[:3])}; expected a file of the released detector"
        )
    return {**copies, **ours}


def detector_to_released(state_dict: StateDict) -> dict[str, Tensor]:
    """Tensors of a :class:`DINOv3PlainDETRHead` under the released names."""
    released = {ours: theirs for theirs, ours in _ENCODER_NAMES.items()}
    return {_detector_renamed(name, released): tensor for name, tensor in state_dict.items()}


def _detector_renamed(name: str, names: Mapping[str, str]) -> str:
    match = _ENCODER.fullmatch(name)
    if match is None:
        return name
    layer, rest = match.groups()
    for old, new in names.items():
        if rest.startswith(old):
            return f"{layer}.{new}{rest.removeprefix(old)}"
    return name


_DETECTION = {
    "detector": HeadNames(
        to_ours=detector_to_ours,
        to_released=detector_to_released,
        released=("dinov3_vit7b16_coco2017_detr_head-b0235ff7.pth",),
    )
}

KINDS = {**_CLASSIFICATION, **_SEGMENTATION, **_MASK2FORMER, **_DEPTH, **_DETECTION}
