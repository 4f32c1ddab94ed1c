"""From class logits and boxes to detections; no suppression, no threshold."""

from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.structures import InstanceData
from torch import Tensor


def best_boxes(
    logits: Tensor,
    boxes: Tensor,
    max_per_img: int,
    image_shape: tuple[int, ...],
    scale_factor: tuple[float, float] | None = None,
) -> InstanceData:
    """The best pairs of query and class; a query may appear with several classes.

    Args:
        logits: class logits (Q, C).
        boxes: centre and size in pixels of the input (Q, 4).
        max_per_img: pairs to return, or all that there are.
        image_shape: height and width of the input without padding; corners are clipped to it.
        scale_factor: width and height of the input as multiples of the original's; None leaves the
            boxes in pixels of the input.

    Returns:
        ``bboxes`` as corners, ``scores`` and ``labels``, best first.
    """
    scores, pairs = logits.sigmoid().flatten().topk(min(max_per_img, logits.numel()))
    corners = bbox_cxcywh_to_xyxy(boxes)[pairs // logits.shape[1]]
    height, width = image_shape[:2]
    limits = corners.new_tensor([width, height, width, height])
    corners = corners.clamp(min=0).minimum(limits)
    if scale_factor is not None:
        corners = corners / corners.new_tensor(scale_factor).repeat(2)
    return InstanceData(bboxes=corners, scores=scores, labels=pairs % logits.shape[1])
