"""The bias of the fused q, k, v projection and the buffer that masks it.

The effective bias is ``bias * bias_mask``. Trained models hold a mask of 1 for q and v and 0 for k;
the released files hold zeros throughout, bias included.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def effective_bias(
    state_dict: Mapping[str, Tensor], block: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The q, k and v biases (D,) of an official block after masking; None if it has no bias."""
    bias = state_dict.get(f"blocks.{block}.attn.qkv.bias")
    if bias is None:
        return None
    mask = state_dict.get(f"blocks.{block}.attn.qkv.bias_mask")
    return (bias if mask is None else bias * mask.to(bias.dtype)).chunk(3)


def add_masked_bias(state_dict: dict[str, Tensor], biases: Mapping[int, Tensor]) -> str:
    """Write bias and mask of blocks whose K bias is zero, and return a note for the report.

    The mask is 1/0/1 as in a trained model. Where every bias of every block is zero it is 0
    throughout, as in the released files, so that all sources of those give the same backbone.

    Args:
        state_dict: official state dict to complete.
        biases: fused bias (3 D,) by block.
    """
    released = not any(bias.any() for bias in biases.values())
    for block, bias in biases.items():
        mask = torch.zeros(bias.numel()) if released else trained_mask(bias.numel())
        state_dict[f"blocks.{block}.attn.qkv.bias"] = bias
        state_dict[f"blocks.{block}.attn.qkv.bias_mask"] = mask
    return f"bias masks made up ({'0/0/0, as all biases are 0' if released else '1/0/1'})"


def trained_mask(size: int) -> Tensor:
    """Bias mask (size,) of a model in training: thirds of 1, 0, 1."""
    mask = torch.ones(size)
    mask[size // 3 : 2 * size // 3] = 0
    return mask


def reset_bias_masks(state_dict: dict[str, Tensor]) -> str:
    """Set every bias mask to 1/0/1 without changing what the model computes; return a note.

    A bias that the stored mask switched off is set to zero first.

    Raises:
        ValueError: If the model has no bias mask.
    """
    masks = [
        name
        for name in state_dict
        if name.endswith(".attn.qkv.bias_mask") and name.removesuffix("_mask") in state_dict
    ]
    if not masks:
        raise ValueError("reset_bias_mask=True, but these weights have no qkv bias mask to reset")
    for name in masks:
        bias_name = name.removesuffix("_mask")
        bias, mask = state_dict[bias_name], state_dict[name]
        state_dict[bias_name] = bias * mask.to(bias.dtype)
        state_dict[name] = trained_mask(mask.numel()).to(mask.dtype)
    return "bias masks reset to 1/0/1"
