"""Losses of metric depth on the pixels that were measured.

All take a prediction, the truth and a bool mask of one shape (B, 1, H, W), compute in fp32 and give
a scalar; without a measured pixel it is 0. A head adds them up, each times its ``loss_weight``,
under its ``loss_name``.
"""

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

# Added before logarithms, in metres.
_LOG_EPS = 1e-3
_MEAN_EPS = 1e-7


class DepthLoss(nn.Module):
    """Base of the losses.

    Args:
        loss_weight: factor.
        loss_name: key in the log; it must contain 'loss'.

    Raises:
        ValueError: for another name, which MMEngine would not add to the total.
    """

    name: str

    def __init__(self, *, loss_weight: float = 1.0, loss_name: str | None = None) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.loss_name = loss_name or self.name
        if "loss" not in self.loss_name:
            raise ValueError(
                f"loss_name is {self.loss_name!r}; it must contain 'loss' to count in the total"
            )

    def forward(
        self, pred: Tensor, target: Tensor, mask: Tensor, *, step: Tensor | None = None
    ) -> Tensor:
        """The weighted loss.

        Args:
            pred, target: depth (B, 1, H, W).
            mask: bool, the same shape; where the truth was measured.
            step: training steps that are done, for losses that change with time; None for late.
        """
        with torch.autocast(pred.device.type, enabled=False):
            # Unmeasured truth may be anything, NaN included.
            target = target.float().masked_fill(~mask, 0.0)
            return self.loss_weight * self.compute(pred.float(), target, mask, step)

    def compute(self, pred: Tensor, target: Tensor, mask: Tensor, step: Tensor | None) -> Tensor:
        """The loss of fp32 inputs whose truth is 0 outside the mask."""
        raise NotImplementedError


@MODELS.register_module()
class DINOv3SigLoss(DepthLoss):
    """Scale-invariant logarithmic loss (arXiv 1406.2283, as a square root).

    ``sqrt(var(g) + 0.15 mean(g)^2)`` with ``g = ln(pred + 0.001) - ln(target + 0.001)`` over all
    measured pixels of the batch.

    Args:
        warm_up: in the first steps the variance is left out.
        **kwargs: see :class:`DepthLoss`.
    """

    name = "loss_sig"

    def __init__(self, *, warm_up: int = 100, **kwargs) -> None:
        super().__init__(**kwargs)
        self.warm_up = warm_up

    def compute(self, pred: Tensor, target: Tensor, mask: Tensor, step: Tensor | None) -> Tensor:
        """See :meth:`DepthLoss.compute`."""
        log_ratio = ((pred + _LOG_EPS).log() - (target + _LOG_EPS).log()).masked_fill(~mask, 0.0)
        count = mask.sum()
        mean = log_ratio.sum() / count.clamp_min(1)
        squares = (log_ratio - mean).square().masked_fill(~mask, 0.0)
        variance = squares.sum() / (count - 1).clamp_min(1)
        squared = 0.15 * mean.square()
        if step is None:
            squared = squared + variance
        else:
            squared = squared + torch.where(step < self.warm_up, 0.0, variance)
        # The slope of a root at 0 is infinite.
        return torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)


@MODELS.register_module()
class DINOv3DepthL1Loss(DepthLoss):
    """Mean absolute difference over the measured pixels of the batch."""

    name = "loss_l1"

    def compute(self, pred: Tensor, target: Tensor, mask: Tensor, step: Tensor | None) -> Tensor:
        """See :meth:`DepthLoss.compute`."""
        difference = (pred - target).abs() * mask
        return difference.sum() / (mask.sum() + _MEAN_EPS)


@MODELS.register_module()
class DINOv3DepthGradientLoss(DepthLoss):
    """Difference of the slopes of prediction and truth, at several strides.

    On maps of every 1st, 2nd, 4th and 6th pixel, the error at a pixel is compared with the error
    two pixels further, along both axes; sums are over pairs of measured pixels, divided by the
    number of measured pixels.

    Args:
        log: compare logarithms.
        strides: subsampling of the maps.
        **kwargs: see :class:`DepthLoss`.
    """

    name = "loss_gradient"

    def __init__(
        self, *, log: bool = False, strides: tuple[int, ...] = (1, 2, 4, 6), **kwargs
    ) -> None:
        super().__init__(**kwargs)
        self.log = log
        self.strides = strides

    def compute(self, pred: Tensor, target: Tensor, mask: Tensor, step: Tensor | None) -> Tensor:
        """See :meth:`DepthLoss.compute`."""
        if self.log:
            pred, target = (pred + _LOG_EPS).log(), (target + _LOG_EPS).log()
        error = (pred - target) * mask
        total = pred.new_zeros(())
        for stride in self.strides:
            part, valid = error[..., ::stride, ::stride], mask[..., ::stride, ::stride]
            slopes = slopes_of(part, valid, distance=2).sum()
            total = total + slopes / valid.sum().clamp_min(1)
        return total


def slopes_of(error: Tensor, mask: Tensor, *, distance: int) -> Tensor:
    """Sum (B,) of the absolute differences of pixels ``distance`` apart, down and across.

    Args:
        error: (B, 1, H, W).
        mask: bool, the same shape; both pixels of a difference must count.
    """
    total = error.new_zeros(len(error))
    for dim in (-2, -1):
        length = max(0, error.shape[dim] - distance)
        near, far = (0, length), (error.shape[dim] - length, length)
        both = mask.narrow(dim, *near) & mask.narrow(dim, *far)
        difference = error.narrow(dim, *near) - error.narrow(dim, *far)
        total = total + (difference.abs() * both).flatten(1).sum(1)
    return total
