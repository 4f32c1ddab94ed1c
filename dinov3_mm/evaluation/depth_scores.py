"""Scores of one depth map against its truth (as since arXiv 1406.2283)."""

from collections.abc import Callable

import torch
from torch import Tensor


def valid_depth(target: Tensor, min_depth: float, max_depth: float) -> Tensor:
    """Where a truth (..., H, W) was measured and lies between the two depths, exclusive."""
    return (target > min_depth) & (target < max_depth)


def eigen_crop(height: int, width: int) -> Tensor:
    """The part of NYUv2 maps that counts: rows 45 to 471, columns 41 to 601 of 480 x 640."""
    rows = (45 * height // 480, 471 * height // 480)
    return _window(height, width, rows, (41 * width // 640, 601 * width // 640))


def garg_crop(height: int, width: int) -> Tensor:
    """The part of KITTI maps that counts (arXiv 1603.04992)."""
    rows = (int(0.40810811 * height), int(0.99189189 * height))
    return _window(height, width, rows, (int(0.03594771 * width), int(0.96405229 * width)))


def _window(height: int, width: int, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[slice(*rows), slice(*columns)] = True
    return inside


CROPS: dict[str, Callable[[int, int], Tensor]] = {"eigen": eigen_crop, "garg": garg_crop}


def scale_and_shift(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of ``pred`` (K,) that bring it closest to ``target`` in squared error.

    A constant prediction gets scale 0 and the mean truth as shift.
    """
    pred, target = pred.double(), target.double()
    centered = pred - pred.mean()
    variance = centered.square().mean()
    covariance = (centered * (target - target.mean())).mean()
    scale = covariance / variance if variance > 0 else torch.zeros_like(variance)
    return scale, target.mean() - scale * pred.mean()


def depth_scores(pred: Tensor, target: Tensor) -> dict[str, float]:
    """Every score of :data:`SCORES`.

    Args:
        pred, target: depth (K,) of the pixels that count, positive.

    Returns:
        Scores by name, NaN if there are no pixels. Distances are in the unit of the depth,
        ``silog`` is times 100, the rest are fractions.
    """
    pred, target = pred.double(), target.double()
    error, ratio = pred - target, torch.maximum(pred / target, target / pred)
    log_error = target.log() - pred.log()
    log_mean_square = log_error.square().mean()
    silog = 100 * (log_mean_square - log_error.mean().square()).clamp_min(0).sqrt()
    scores = {
        "a1": (ratio < 1.25).double().mean(),
        "a2": (ratio < 1.25**2).double().mean(),
        "a3": (ratio < 1.25**3).double().mean(),
        "abs_rel": (error.abs() / target).mean(),
        "rmse": error.square().mean().sqrt(),
        "log_10": (target.log10() - pred.log10()).abs().mean(),
        "rmse_log": log_mean_square.sqrt(),
        "silog": silog,
        "sq_rel": (error.square() / target).mean(),
        "mae": error.abs().mean(),
    }
    return {name: value.item() for name, value in scores.items()}


SCORES = (
    "a1",
    "a2",
    "a3",
    "abs_rel",
    "rmse",
    "log_10",
    "rmse_log",
    "silog",
    "sq_rel",
    "mae",
)
