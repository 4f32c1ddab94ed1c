"""The Dice loss of the official segmentation trainer."""

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F


@MODELS.register_module()
class DINOv3DiceLoss(nn.Module):
    """One minus the Dice overlap of softmax and labels, averaged over images and classes.

    For class c, over the pixels of an image: ``1 - (2 sum p y + s) / (sum p^e + sum y^e + s)``. A
    pixel to ignore is left out of the numerator; in the denominator it counts as one of the last
    class, as in the official trainer. mmseg's ``DiceLoss`` squares otherwise and has another
    smoothing.

    Args:
        smooth: s, against classes that are absent.
        exponent: e.
        loss_weight: factor.
        loss_name: name in the log.
    """

    def __init__(
        self,
        *,
        smooth: float = 1.0,
        exponent: float = 2.0,
        loss_weight: float = 1.0,
        loss_name: str = "loss_dice",
    ) -> None:
        super().__init__()
        self.smooth = smooth
        self.exponent = exponent
        self.loss_weight = loss_weight
        self.loss_name = loss_name

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = 255,
        **_: object,
    ) -> Tensor:
        """The loss of logits (B, K, H, W) and labels (B, H, W).

        Raises:
            ValueError: If there are weights, which this loss does not take.
        """
        if weight is not None:
            raise ValueError("DINOv3DiceLoss takes no pixel weights; set decode_head.sampler=None")
        num_classes = logits.shape[1]
        probability = logits.softmax(1)
        one_hot = F.one_hot(labels.clamp(0, num_classes - 1), num_classes)
        truth = one_hot.movedim(-1, 1).to(probability.dtype)
        valid = (labels != ignore_index)[:, None]
        pixels = (2, 3)
        overlap = 2 * (probability * truth * valid).sum(pixels) + self.smooth
        size = (probability**self.exponent + truth**self.exponent).sum(pixels) + self.smooth
        return self.loss_weight * torch.mean(1 - overlap / size)
