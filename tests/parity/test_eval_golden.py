"""k-NN votes and metrics against the reference vectors."""

import pytest
import torch

from dinov3_mm.evaluation.knn import knn_scores
from dinov3_mm.evaluation.metrics import (
    any_match_accuracy,
    confusion_matrix,
    mean_reciprocal_rank,
    reduce_zero_label,
    segmentation_metrics,
)
from tests.golden import assert_parity, load_golden


@pytest.fixture(scope="module")
def knn():
    return load_golden("heads_knn")


def test_knn_votes(knn):
    description, tensors = knn
    scores = knn_scores(
        tensors["in.train"],
        tensors["in.labels"],
        tensors["in.test"],
        ks=description["ks"],
        num_classes=description["num_classes"],
        temperature=description["T"],
        normalize=False,
    )
    assert sorted(scores) == sorted(description["ks"])
    for k, score in scores.items():
        assert_parity(score, tensors[f"out.probs_k{k}"])


def test_knn_votes_without_the_nearest(knn):
    description, tensors = knn
    scores = knn_scores(
        tensors["in.train"],
        tensors["in.labels"],
        tensors["in.train"][:6],
        ks=(3, 10),
        num_classes=description["num_classes"],
        temperature=description["T"],
        skip_first=True,
    )
    for k in (3, 10):
        assert_parity(scores[k], tensors[f"out.skipfirst_probs_k{k}"])


def test_knn_votes_for_several_labels(knn):
    description, tensors = knn
    scores = knn_scores(
        tensors["in.train"],
        tensors["in.multi_labels"],
        tensors["in.test"],
        ks=(5,),
        temperature=description["T"],
    )
    assert_parity(scores[5], tensors["out.multilabel_probs_k5"])


def test_any_match_and_reciprocal_rank():
    _, tensors = load_golden("heads_cls_metrics")
    scores, targets = tensors["in.preds"], tensors["in.targets"]
    for k in (1, 2):
        expected = tensors[f"out.any_match_top{k}"].item()
        assert any_match_accuracy(scores, targets, k) == pytest.approx(expected, abs=1e-6)
    rank = mean_reciprocal_rank(scores, tensors["in.mrr_targets"])
    assert rank == pytest.approx(tensors["out.mrr"].item(), abs=1e-6)


def test_segmentation_metrics():
    description, tensors = load_golden("heads_seg_metrics")
    num_classes = description["num_classes"]
    total = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for index in (0, 1):
        labels = reduce_zero_label(tensors[f"in.label{index}"])
        if index == 0:
            assert torch.equal(labels, tensors["out.reduced0"])
        confusion = confusion_matrix(tensors[f"in.pred{index}"], labels, num_classes)
        intersect, predicted, label = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
        areas = torch.stack([intersect, predicted + label - intersect, predicted, label])
        assert torch.equal(areas.float(), tensors["out.areas"][index])
        total += confusion
    for name, value in segmentation_metrics(total).items():
        assert value == pytest.approx(tensors[f"out.m.{name}"].item(), abs=1e-6), name
