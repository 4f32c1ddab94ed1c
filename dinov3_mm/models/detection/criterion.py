"""Training loss of Plain-DETR (arXiv 2308.01904): matching, focal, offset and GIoU terms."""

import torch
from mmdet.models.losses import FocalLoss, GIoULoss
from mmdet.registry import TASK_UTILS as MMDET_TASK_UTILS
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_xyxy_to_cxcywh
from mmdet.utils import reduce_mean
from mmengine.registry import TASK_UTILS
from mmengine.structures import InstanceData
from torch import Tensor

from .decoder import BoxPredictions, box_deltas

DEFAULT_ASSIGNER = {
    "type": "HungarianAssigner",
    "match_costs": [
        {"type": "FocalLossCost", "weight": 2.0, "eps": 1e-8},
        {"type": "DINOv3BoxDeltaCost", "weight": 1.0},
        {"type": "IoUCost", "iou_mode": "giou", "weight": 2.0},
    ],
}


@TASK_UTILS.register_module()
class DINOv3BoxDeltaCost:
    """L1 distance of predicted offsets to those that lead from ``priors`` to the ground truth.

    A match cost for mmdet's assigners. Predictions carry ``deltas`` (Q, 4) and ``priors`` (Q, 4),
    the boxes that the offsets refer to, as corners; the ground truth has ``bboxes`` as corners.

    Args:
        weight: factor of the cost.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(
        self,
        pred_instances: InstanceData,
        gt_instances: InstanceData,
        img_meta: dict | None = None,
        **kwargs,
    ) -> Tensor:
        """Cost (Q, number of objects)."""
        references = bbox_xyxy_to_cxcywh(pred_instances.priors)
        targets = bbox_xyxy_to_cxcywh(gt_instances.bboxes)
        wanted = box_deltas(references[:, None], targets[None])
        return self.weight * (pred_instances.deltas[:, None] - wanted).abs().sum(-1)


class PlainDETRCriterion:
    """Losses of predictions against objects.

    Focal loss over all queries and classes, L1 of the offsets of matched queries from their
    reference boxes, and one minus GIoU of their boxes, each divided by the number of objects (the
    mean over the ranks, at least one).

    Args:
        assigner: config of an assigner of mmdet; None is Hungarian matching by the three terms with
            the weights of the losses.
        cls_weight, bbox_weight, iou_weight: weights of the terms.
    """

    def __init__(
        self,
        assigner: dict | None = None,
        *,
        cls_weight: float = 2.0,
        bbox_weight: float = 1.0,
        iou_weight: float = 2.0,
    ) -> None:
        self.assigner = MMDET_TASK_UTILS.build(assigner or DEFAULT_ASSIGNER)
        self.loss_cls = FocalLoss(use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=cls_weight)
        self.loss_iou = GIoULoss(loss_weight=iou_weight)
        self.bbox_weight = bbox_weight

    def __call__(
        self, predictions: BoxPredictions, targets: list[InstanceData], num_boxes: float
    ) -> dict[str, Tensor]:
        """Losses of one layer.

        Args:
            predictions: of all images.
            targets: ``bboxes`` (n, 4) as corners and ``labels`` (n,) that index the logits, of each
                image.
            num_boxes: what to divide by, from :func:`mean_count`.

        Returns:
            ``loss_cls``, ``loss_bbox`` and ``loss_iou``.
        """
        matches = [self.match(predictions, index, image) for index, image in enumerate(targets)]
        labels = predictions.logits.new_full(
            predictions.logits.shape[:2], predictions.logits.shape[2], dtype=torch.long
        )
        for row, (queries, objects), image in zip(labels, matches, targets):
            row[queries] = image.labels[objects]
        rows, queries, boxes = _gather(matches, targets, labels.device)
        references = predictions.references[rows, queries].detach()
        wanted = box_deltas(references, bbox_xyxy_to_cxcywh(boxes))
        deltas = predictions.deltas[rows, queries]
        found = bbox_cxcywh_to_xyxy(predictions.boxes[rows, queries])
        return {
            "loss_cls": self.loss_cls(
                predictions.logits.flatten(0, 1), labels.flatten(), avg_factor=num_boxes
            ),
            "loss_bbox": self.bbox_weight * (deltas - wanted).abs().sum() / num_boxes,
            "loss_iou": self.loss_iou(found, boxes, avg_factor=num_boxes),
        }

    @torch.no_grad()
    def match(
        self, predictions: BoxPredictions, index: int, target: InstanceData
    ) -> tuple[Tensor, Tensor]:
        """Matched queries and objects of image ``index``, by ascending query."""
        instances = InstanceData(
            scores=predictions.logits[index],
            bboxes=bbox_cxcywh_to_xyxy(predictions.boxes[index]),
            priors=bbox_cxcywh_to_xyxy(predictions.references[index]),
            deltas=predictions.deltas[index],
        )
        assigned = self.assigner.assign(instances, target).gt_inds
        queries = (assigned > 0).nonzero().flatten()
        return queries, assigned[queries] - 1


def mean_count(targets: list[InstanceData], device: torch.device) -> float:
    """Mean number of objects over the ranks, at least one."""
    count = torch.tensor([float(sum(len(image) for image in targets))], device=device)
    return max(1.0, reduce_mean(count).item())


def _gather(
    matches: list[tuple[Tensor, Tensor]], targets: list[InstanceData], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Images, queries and target boxes of all matches."""
    rows = [torch.full_like(queries, index) for index, (queries, _) in enumerate(matches)]
    queries = [queries for queries, _ in matches]
    boxes = [image.bboxes[objects] for (_, objects), image in zip(matches, targets)]
    return torch.cat(rows), torch.cat(queries), torch.cat(boxes)
