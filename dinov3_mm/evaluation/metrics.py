"""Classification and segmentation metrics from predictions, labels and one confusion matrix."""

import torch
from torch import Tensor

from dinov3_mm.datasets.evaluation_images import IGNORE_INDEX


def top_k_accuracy(scores: Tensor, targets: Tensor, k: int = 1) -> float:
    """Share of rows of ``scores`` (N, C) whose ``targets`` (N,) entry is among the ``k`` best."""
    _check_rows(scores, targets)
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (best == targets[:, None]).any(dim=1).double().mean().item()


def any_match_accuracy(scores: Tensor, targets: Tensor, k: int = 1) -> float:
    """Top-``k`` accuracy with several admissible labels per sample, as ImageNet-ReaL is scored.

    ``targets`` (N, M) holds the admissible labels padded with -1; samples without one are left out.
    """
    _check_rows(scores, targets)
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    hit = (best[:, :, None] == targets[:, None, :]).flatten(1).any(dim=1)
    labelled = (targets >= 0).any(dim=1)
    return hit[labelled].double().mean().item()


def mean_per_class_accuracy(scores: Tensor, targets: Tensor) -> float:
    """Top-1 accuracy of each class present in ``targets`` (N,), averaged over those classes."""
    _check_rows(scores, targets)
    correct = (scores.argmax(dim=1) == targets).double()
    return _mean_by_class(correct, targets, scores.shape[1]).nanmean().item()


def mean_reciprocal_rank(scores: Tensor, targets: Tensor) -> float:
    """Mean of 1/rank per class, averaged over all columns of ``scores`` (an empty class counts 0).

    The rank of a target is the number of scores that are at least as high as its own.
    """
    _check_rows(scores, targets)
    own = scores.gather(1, targets[:, None])
    reciprocal = (scores >= own).sum(dim=1).double().reciprocal()
    return _mean_by_class(reciprocal, targets, scores.shape[1]).nan_to_num(0.0).mean().item()


def confusion_matrix(
    predictions: Tensor, targets: Tensor, num_classes: int, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Count (target, prediction) pairs: (C, C) int64, rows are targets.

    Positions whose target is ``ignore_index`` are left out.

    Raises:
        ValueError: if the shapes differ or a label lies outside ``[0, num_classes)``.
    """
    if predictions.shape != targets.shape:
        raise ValueError(
            f"predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)} must have "
            "the same shape"
        )
    keep = targets != ignore_index
    for name, values in (("prediction", predictions[keep]), ("target", targets[keep])):
        if values.numel() and not (values.min() >= 0 and values.max() < num_classes):
            raise ValueError(
                f"{name} labels span [{values.min()}, {values.max()}], expected "
                f"[0, {num_classes - 1}] or the ignore index {ignore_index}"
            )
    return count_pairs(predictions, targets, num_classes, ignore_index)


def count_pairs(
    predictions: Tensor, targets: Tensor, num_classes: int, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """`confusion_matrix` of values that were checked before, which need not be read for it."""
    pairs = targets.long() * num_classes + predictions.long()
    # One more cell, for the positions that are left out: choosing rows would wait for the device.
    pairs = torch.where(targets == ignore_index, num_classes**2, pairs).flatten()
    counts = pairs.new_zeros(num_classes**2 + 1).index_add_(0, pairs, torch.ones_like(pairs))
    return counts[:-1].view(num_classes, num_classes)


def segmentation_metrics(confusion: Tensor) -> dict[str, float]:
    """Dataset-level segmentation scores from a confusion matrix (C, C), rows are targets.

    With I, P, G the intersection, prediction and label areas of a class: ``mIoU`` = mean
    I/(P+G-I), ``acc`` = mean I/G, ``aAcc`` = sum I / sum G, ``dice`` = mean 2I/(P+G),
    ``precision`` = mean I/P, ``recall`` = mean I/G, ``fscore`` = mean of the classes' F1. Classes
    whose denominator is empty are left out of the means; values are fractions.
    """
    confusion = confusion.double()
    intersect = confusion.diagonal()
    label, predicted = confusion.sum(dim=1), confusion.sum(dim=0)
    precision, recall = intersect / predicted, intersect / label
    values = {
        "mIoU": intersect / (predicted + label - intersect),
        "acc": recall,
        "aAcc": intersect.sum() / label.sum(),
        "dice": 2 * intersect / (predicted + label),
        "fscore": 2 * precision * recall / (precision + recall),
        "precision": precision,
        "recall": recall,
    }
    return {name: value.nanmean().item() for name, value in values.items()}


def iou_per_class(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, (C,) float64; NaN where the class never occurs."""
    confusion = confusion.double()
    intersect = confusion.diagonal()
    return intersect / (confusion.sum(dim=0) + confusion.sum(dim=1) - intersect)


def reduce_zero_label(mask: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Drop label 0 ("unlabelled") from a mask: 0 becomes ``ignore_index``, the others move down."""
    reduced = torch.where(mask == ignore_index, mask, mask - 1)
    return torch.where(mask == 0, torch.full_like(mask, ignore_index), reduced)


def _mean_by_class(values: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Mean of ``values`` (N,) float64 within each class, NaN for an empty one."""
    totals = values.new_zeros(num_classes).scatter_add_(0, targets, values)
    return totals / torch.bincount(targets, minlength=num_classes)


def _check_rows(scores: Tensor, targets: Tensor) -> None:
    if scores.ndim != 2 or len(scores) != len(targets) or not len(scores):
        raise ValueError(
            f"scores {tuple(scores.shape)} must be (samples, classes), not empty, with one target "
            f"row each, got targets {tuple(targets.shape)}"
        )
