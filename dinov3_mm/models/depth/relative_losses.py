"""Losses of relative depth: an unknown scale and shift of every image do not matter.

From MiDaS (arXiv 1907.01341, section 5), which Depth Anything V2 (arXiv 2406.09414) and with it the
relative depth system of DINOv3 train with.
"""

import torch
from mmengine.registry import MODELS
from torch import Tensor

from dinov3_mm.suggest import hint

from .alignment import least_squares, normalized
from .losses import DepthLoss, slopes_of

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
