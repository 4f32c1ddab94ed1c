"""Confusion matrix errors and the classes that a mean leaves out."""

import math

import pytest
import torch

from dinov3_mm.evaluation.metrics import (
    confusion_matrix,
    iou_per_class,
    reduce_zero_label,
    segmentation_metrics,
    top_k_accuracy,
)


def test_absent_classes_are_left_out_of_the_mean():
    confusion = torch.tensor([[6, 2, 0], [0, 4, 0], [0, 0, 0]])
    assert segmentation_metrics(confusion)["mIoU"] == pytest.approx((6 / 8 + 4 / 6) / 2)
    assert math.isnan(iou_per_class(confusion)[2])


def test_reduce_zero_label_keeps_the_ignore_index():
    mask = torch.tensor([0, 1, 5, 255], dtype=torch.uint8)
    assert reduce_zero_label(mask).tolist() == [255, 0, 4, 255]


def test_labels_out_of_range_and_shapes_are_refused():
    with pytest.raises(ValueError, match=r"target labels span \[0, 4\]"):
        confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 4]), 3)
    with pytest.raises(ValueError, match="prediction labels span"):
        confusion_matrix(torch.tensor([-1, 1]), torch.tensor([0, 2]), 3)
    with pytest.raises(ValueError, match="same shape"):
        confusion_matrix(torch.zeros(2, 2), torch.zeros(4), 3)
    with pytest.raises(ValueError, match="one target"):
        top_k_accuracy(torch.zeros(3, 2), torch.zeros(2))
