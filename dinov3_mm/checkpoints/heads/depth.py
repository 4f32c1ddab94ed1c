"""Depth heads: the released DPT decoders, and linear heads as the official trainer writes them.

:class:`DINOv3DPTDepthHead` and :class:`DINOv3LinearDepthHead` carry the official names. Files hold
the decoder alone; a whole depth model has it under ``decoder.``, beside the backbone.
"""

import torch
from torch import Tensor

from .kinds import HeadNames, StateDict

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


KINDS = {
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
