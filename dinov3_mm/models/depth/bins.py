"""From the output of a depth head to metres: classification over bins, or regression."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dinov3_mm.errors import hint

# Factor between the two ends of the mixed bins and the canopy height that they stand for.
_MIXLOG_SCALE = 8.0


def bin_centers(strategy: str, num_bins: int, min_depth: float, max_depth: float) -> Tensor:
    """Depths that the channels of a head stand for.

    Args:
        strategy: 'linear', equal steps; 'log', equal ratios; 'mixlog', from logarithmic to linear
            over an eighth of the range, as in the released canopy-height model.
        num_bins: N, 2 or more.
        min_depth, max_depth: first and last depth, for 'mixlog' an eighth of the last.

    Returns:
        (N,), ascending, fp32.

    Raises:
        ValueError: if the strategy is unknown or the range is no range.
    """
    if strategy not in BINS:
        raise ValueError(f"bins is {strategy!r}; {hint(strategy, BINS)}")
    if num_bins < 2:
        raise ValueError(f"num_bins is {num_bins}; bins need 2 or more (1 is regression)")
    if not 0 < min_depth < max_depth:
        raise ValueError(
            f"depths from {min_depth} to {max_depth} are no range; expected 0 < min < max"
        )
    return BINS[strategy](num_bins, min_depth, max_depth)


def _linear(num_bins: int, low: float, high: float) -> Tensor:
    return torch.linspace(low, high, num_bins, dtype=torch.float32)


def _log(num_bins: int, low: float, high: float) -> Tensor:
    return torch.linspace(math.log(low), math.log(high), num_bins, dtype=torch.float32).exp()


def _mixlog(num_bins: int, low: float, high: float) -> Tensor:
    high = high / _MIXLOG_SCALE
    log_share = torch.linspace(1.0, 0.0, num_bins, dtype=torch.float32)
    logarithmic, linear = _log(num_bins, low, high), _linear(num_bins, low, high)
    return log_share * logarithmic + (1.0 - log_share) * linear


BINS: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": _linear,
    "log": _log,
    "mixlog": _mixlog,
}


def expected_depth(logits: Tensor, bins: Tensor, norm: str) -> Tensor:
    """Mean of the bins under the distribution that the logits describe, in fp32.

    Args:
        logits: (B, N, H, W), of any floating dtype.
        bins: (N,), from :func:`bin_centers`.
        norm: how logits become a distribution: 'linear' (shifted ReLU), 'softmax', 'sigmoid', or
            'mixlog' (ReLU, the result times 8), which belongs to the bins of that name.

    Returns:
        Depth (B, 1, H, W).

    Raises:
        ValueError: if the norm is unknown.
    """
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; {hint(norm, NORMS)}")
    with torch.autocast(logits.device.type, enabled=False):
        return NORMS[norm](logits.float(), bins.float()[:, None, None])


def regressed_depth(logits: Tensor, min_depth: float) -> Tensor:
    """Depth (B, 1, H, W) of a head with one channel, in fp32."""
    return logits.float().relu() + min_depth


def _mean(scores: Tensor, bins: Tensor) -> Tensor:
    shares = scores / scores.sum(1, keepdim=True)
    return (shares * bins).sum(1, keepdim=True)


def _by_linear(logits: Tensor, bins: Tensor) -> Tensor:
    return _mean(logits.relu() + 0.1, bins)


def _by_softmax(logits: Tensor, bins: Tensor) -> Tensor:
    return (logits.softmax(1) * bins).sum(1, keepdim=True)


def _by_sigmoid(logits: Tensor, bins: Tensor) -> Tensor:
    return _mean(logits.sigmoid(), bins)


def _by_mixlog(logits: Tensor, bins: Tensor) -> Tensor:
    scores = logits.relu()
    shift = (-scores.amin(1, keepdim=True)).clamp(0.0, 1e-4) + 1e-8
    scores = scores + shift
    total = scores.sum(1, keepdim=True)
    total = torch.nan_to_num(total, nan=1.0, posinf=1.0, neginf=1.0).clamp_min(1e-12)
    depth = (scores / total * bins.clamp_min(1e-12)).sum(1, keepdim=True)
    return _MIXLOG_SCALE * depth.clamp_min(1e-12)


NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": _by_linear,
    "softmax": _by_softmax,
    "sigmoid": _by_sigmoid,
    "mixlog": _by_mixlog,
}
