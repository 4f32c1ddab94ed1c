"""Depth up to scale and shift: how maps are brought together before they are compared.

A scale and a shift belong to an image, and are found on its measured pixels.
"""

import torch
from torch import Tensor

_EPS = 1e-6


def least_squares(pred: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift that bring each prediction closest to its truth, in squared error.

    Args:
        pred, target: (B, ...), of a floating dtype.
        mask: bool, the same shape; pixels that count.

    Returns:
        Scale and shift, (B,) each. A prediction that is constant, or has no pixel that counts, gets
        scale 0 and the mean truth as shift.
    """
    pred, target, mask = (x.flatten(1) for x in (pred, target, mask))
    count = mask.sum(1).clamp_min(1)
    mean_pred = _mean(pred, mask, count)
    mean_target = _mean(target, mask, count)
    centered = pred - mean_pred[:, None]
    variance = _mean(centered.square(), mask, count)
    covariance = _mean(centered * (target - mean_target[:, None]), mask, count)
    flat = variance <= _EPS * _EPS * mean_pred.square() + torch.finfo(pred.dtype).tiny
    scale = torch.where(flat, 0.0, covariance / torch.where(flat, 1.0, variance))
    return scale, mean_target - scale * mean_pred


def normalized(depth: Tensor, mask: Tensor) -> Tensor:
    """Maps (B, ...) minus their median, divided by their mean absolute deviation from it."""
    flat, valid = depth.flatten(1), mask.flatten(1)
    shift = flat.masked_fill(~valid, torch.nan).nanmedian(1, keepdim=True).values
    shift = torch.nan_to_num(shift)
    deviation = (flat - shift).abs()
    scale = _mean(deviation, valid, valid.sum(1).clamp_min(1)).clamp_min(_EPS)
    return ((flat - shift) / scale[:, None]).view_as(depth)


def _mean(values: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0.0).sum(1) / count
