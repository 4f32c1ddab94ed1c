"""The released Mask2Former segmentor: an adapter and a head in one file.

Stage 0 of the official model is the adapter around its backbone, stage 1 the head. The adapter has
the official names here too; the head is made of mmdet's modules, which have theirs.
"""

import re
from functools import partial

from torch import Tensor

from .kinds import HeadNames, StateDict

_ADAPTER, _HEAD = "segmentation_model.0.", "segmentation_model.1."
_BACKBONE = "backbone."

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
    return {_renamed(name.removeprefix(_HEAD), _TO_OURS): t for name, t in kept.items()}


def mask2former_to_released(state_dict: StateDict) -> dict[str, Tensor]:
    """Our ``decode_head`` under official names, with the prefix of the assembled model."""
    return {_HEAD + _renamed(name, _TO_RELEASED): tensor for name, tensor in state_dict.items()}


def adapter_to_ours(state_dict: StateDict) -> dict[str, Tensor]:
    """The adapter of a segmentor's file, without its backbone, which has a file of its own."""
    kept = {name.removeprefix(_ADAPTER): t for name, t in _without(state_dict, _HEAD).items()}
    return _without(kept, _BACKBONE)


def adapter_to_released(state_dict: StateDict) -> dict[str, Tensor]:
    """``adapter.own_modules()`` with the prefix of the assembled official model."""
    return {_ADAPTER + name: tensor for name, tensor in state_dict.items()}


def _without(state_dict: StateDict, prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith(prefix)}


def _renamed(name: str, rules: list[tuple[re.Pattern, str]]) -> str:
    """A name by the first rule that fits its beginning; unknown names stay what they are."""
    for pattern, replacement in rules:
        match = pattern.match(name)
        if match:
            return match.expand(replacement) + name[match.end() :]
    return name


_names = partial(HeadNames, released=("dinov3_vit7b16_ade20k_m2f_head-bf307cb1.pth",))
KINDS = {
    "mask2former": _names(to_ours=mask2former_to_ours, to_released=mask2former_to_released),
    "mask2former_adapter": _names(to_ours=adapter_to_ours, to_released=adapter_to_released),
}
