"""Boxes as offsets from reference boxes, in absolute pixels (Plain-DETR, arXiv 2308.01904).

Boxes are centre x, centre y, width, height in pixels unless a name says otherwise.
"""

import math

import torch
from mmdet.structures.bbox import bbox_xyxy_to_cxcywh
from torch import Tensor

# exp() of a size offset stays within 16/1000 and 1000/16.
MAX_SIZE_OFFSET = abs(math.log(16 / 1000))
# Keeps the offsets of a target finite where the reference box is empty.
_SIZE_EPS = 0.1
_TEMPERATURE = 10000


def refine_boxes(references: Tensor, deltas: Tensor, limits: Tensor | None = None) -> Tensor:
    """Move and scale reference boxes.

    Args:
        references: boxes (..., 4).
        deltas: offsets (..., 4): of the centre in units of the reference's size, and of the
            logarithm of the size, which is held within :data:`MAX_SIZE_OFFSET`.
        limits: width and height that corners are clipped to, broadcastable to (..., 2); None does
            not clip.

    Returns:
        Boxes (..., 4).
    """
    sizes = references[..., 2:]
    centres = references[..., :2] + sizes * deltas[..., :2]
    sizes = sizes * deltas[..., 2:].clamp(-MAX_SIZE_OFFSET, MAX_SIZE_OFFSET).exp()
    if limits is None:
        return torch.cat((centres, sizes), dim=-1)
    low, high = centres - 0.5 * sizes, centres + 0.5 * sizes
    zero = limits.new_zeros(())
    corners = [torch.minimum(torch.maximum(corner, zero), limits) for corner in (low, high)]
    return bbox_xyxy_to_cxcywh(torch.cat(corners, dim=-1))


def box_deltas(references: Tensor, targets: Tensor) -> Tensor:
    """Offsets that lead from reference boxes to target boxes.

    Args:
        references: boxes (..., 4).
        targets: boxes (..., 4) with positive sizes.

    Returns:
        Offsets (..., 4) as :func:`refine_boxes` takes them; 0.1 px are added to the sizes of the
        references.
    """
    sizes = references[..., 2:] + _SIZE_EPS
    return torch.cat(
        (
            (targets[..., :2] - references[..., :2]) / sizes,
            (targets[..., 2:] / sizes).log(),
        ),
        dim=-1,
    )


def embed_boxes(boxes: Tensor, num_feats: int) -> Tensor:
    """Sine embedding of the four numbers of each box, times 2 pi and otherwise as they are.

    Args:
        boxes: boxes (..., 4).
        num_feats: features of each number, even.

    Returns:
        (..., 4 * ``num_feats``): the numbers in their order, sine and cosine in turn.
    """
    index = torch.arange(num_feats, dtype=torch.float32, device=boxes.device)
    periods = _TEMPERATURE ** (2 * (index // 2) / num_feats)
    angles = (boxes * (2 * math.pi))[..., None] / periods
    waves = torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1)
    return waves.flatten(-3)
