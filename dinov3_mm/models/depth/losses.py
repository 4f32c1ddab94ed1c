"""Losses of depth: metric on the pixels that were measured, and up to scale and shift."""

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from dinov3_mm.errors import hint

# --- Losses of metric depth on the pixels that were measured ---
#
# All take a prediction, the truth and a bool mask of one shape (B, 1, H, W), compute in fp32 and
# give a scalar; without a measured pixel it is 0. A head adds them up, each times its
# ``loss_weight``, under its ``loss_name``.


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


# --- Depth up to scale and shift: how maps are brought together before they are compared ---
#
# A scale and a shift belong to an image, and are found on its measured pixels.


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


# --- Losses of relative depth: an unknown scale and shift of every image do not matter ---
#
# From MiDaS (arXiv 1907.01341, section 5), which Depth Anything V2 (arXiv 2406.09414) and with it
# the relative depth system of DINOv3 train with.


SPACES = ("depth", "disparity")
ALIGNMENTS = ("robust", "least_squares")
_DISPARITY_EPS = 1e-6


class RelativeDepthLoss(DepthLoss):
    """Base: residuals of aligned maps.

    Args:
        space: what is compared, 'depth' or 'disparity' (1 / depth).
        align: 'robust' takes its median from either map and divides it by the mean absolute
            deviation; 'least_squares' fits the prediction to the truth.
        **kwargs: see :class:`DepthLoss`.

    Raises:
        ValueError: if one of them is unknown.
    """

    def __init__(self, *, space: str = "disparity", align: str = "robust", **kwargs) -> None:
        super().__init__(**kwargs)
        for given, name, known in ((space, "space", SPACES), (align, "align", ALIGNMENTS)):
            if given not in known:
                raise ValueError(f"{name} is {given!r}; {hint(given, known)}")
        self.space = space
        self.align = align

    def residuals(self, pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Differences (B, 1, H, W) of the aligned maps, 0 outside the mask."""
        if self.space == "disparity":
            pred, target = (1 / x.clamp_min(_DISPARITY_EPS) for x in (pred, target))
            target = target.masked_fill(~mask, 0.0)
        if self.align == "robust":
            difference = normalized(pred, mask) - normalized(target, mask)
        else:
            scale, shift = (x[:, None, None, None] for x in least_squares(pred, target, mask))
            difference = scale * pred + shift - target
        return difference.masked_fill(~mask, 0.0)


@MODELS.register_module()
class DINOv3ScaleShiftLoss(RelativeDepthLoss):
    """Scale- and shift-invariant loss, trimmed.

    Half the mean absolute residual of each image, without its largest residuals; mean over images
    that have measured pixels. With least squares, half the mean squared residual.

    Args:
        trim: share of the largest residuals that is left out, against errors of the truth.
        **kwargs: see :class:`RelativeDepthLoss`.

    Raises:
        ValueError: if the share is not in [0, 1).
    """

    name = "loss_scale_shift"

    def __init__(self, *, trim: float = 0.2, **kwargs) -> None:
        super().__init__(**kwargs)
        if not 0 <= trim < 1:
            raise ValueError(f"trim is {trim}; expected a share from 0 to below 1")
        self.trim = trim

    def compute(self, pred: Tensor, target: Tensor, mask: Tensor, step: Tensor | None) -> Tensor:
        """See :meth:`DepthLoss.compute`."""
        size = self.residuals(pred, target, mask).flatten(1).abs()
        if self.align == "least_squares":
            size = size.square()
        count = mask.flatten(1).sum(1)
        if self.trim:
            size = size.masked_fill(~mask.flatten(1), torch.inf).sort(1).values
            rank = torch.arange(size.shape[1], device=size.device)
            size = size.masked_fill(rank >= ((1 - self.trim) * count).ceil()[:, None], 0.0)
        per_image = size.sum(1) / (2 * count.clamp_min(1))
        return per_image.sum() / (count > 0).sum().clamp_min(1)


@MODELS.register_module()
class DINOv3GradientMatchingLoss(RelativeDepthLoss):
    """Slopes of the residuals at several resolutions: edges of the prediction follow the truth.

    Args:
        num_scales: resolutions, each half the one before.
        **kwargs: see :class:`RelativeDepthLoss`.
    """

    name = "loss_gradient_matching"

    def __init__(self, *, num_scales: int = 4, **kwargs) -> None:
        super().__init__(**kwargs)
        self.num_scales = num_scales

    def compute(self, pred: Tensor, target: Tensor, mask: Tensor, step: Tensor | None) -> Tensor:
        """See :meth:`DepthLoss.compute`."""
        residuals = self.residuals(pred, target, mask)
        total = pred.new_zeros(())
        for scale in range(self.num_scales):
            stride = 2**scale
            part, valid = residuals[..., ::stride, ::stride], mask[..., ::stride, ::stride]
            slopes = slopes_of(part, valid, distance=1)
            count = valid.flatten(1).sum(1)
            total = total + (slopes / count.clamp_min(1)).sum() / (count > 0).sum().clamp_min(1)
        return total
