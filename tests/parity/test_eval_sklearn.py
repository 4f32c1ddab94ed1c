"""k-NN, ridge, confusion matrix and PCA against scikit-learn."""

import numpy as np
import pytest
import torch

from dinov3_mm.evaluation.dense_probe import RidgeStatistics, fit_patch_classifier
from dinov3_mm.evaluation.knn import knn_scores
from dinov3_mm.evaluation.metrics import (
    confusion_matrix,
    iou_per_class,
    mean_per_class_accuracy,
    segmentation_metrics,
    top_k_accuracy,
)
from dinov3_mm.visualization.patches import PatchPCA

decomposition = pytest.importorskip("sklearn.decomposition")
linear_model = pytest.importorskip("sklearn.linear_model")
metrics = pytest.importorskip("sklearn.metrics")
neighbors = pytest.importorskip("sklearn.neighbors")


def _clusters(num: int, dims: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(num) % classes
    centres = torch.randn(classes, dims, generator=torch.Generator().manual_seed(1))
    return centres[labels] + 1.5 * torch.randn(num, dims), labels


def test_knn_is_sklearns_with_softmax_weights():
    train, labels = _clusters(600, 24, 7)
    test, _ = _clusters(150, 24, 7)
    k, temperature = 15, 0.07
    # softmax over the k nearest = exponential weights normalised by their sum
    oracle = neighbors.KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(train.double().numpy(), labels.numpy())
    expected = oracle.predict_proba(test.double().numpy())
    actual = knn_scores(train, labels, test, ks=(k,), temperature=temperature)[k]
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("alpha", [1e-2, 30.0])
def test_weighted_ridge_is_sklearns(alpha):
    features, labels = _clusters(500, 12, 4)
    features += 3.0  # a mean that must cancel
    class_weights = torch.tensor([0.3, 1.0, 2.0, 5.0])
    oracle = linear_model.Ridge(alpha=alpha).fit(
        features.double().numpy(),
        np.eye(4)[labels.numpy()],
        sample_weight=class_weights[labels].numpy(),
    )
    parts = [slice(0, 123), slice(123, 500)]  # statistics of parts add up
    first, second = (
        RidgeStatistics.of_classes(features[p], labels[p], class_weights) for p in parts
    )
    whole = first + second
    weight, bias = whole.solve(alpha)
    np.testing.assert_allclose(weight.T.numpy(), oracle.coef_, atol=1e-5)
    np.testing.assert_allclose(bias.numpy(), oracle.intercept_, atol=2e-5)


def test_patch_classifier_is_sklearns_ridge_at_its_strength():
    features, labels = _clusters(40 * 9, 10, 3)
    features = 5 + 2 * features
    classifier = fit_patch_classifier(
        features.view(40, 9, 10), labels.view(40, 9), 3, ridges=(1e-2,), balances=(0.0,)
    )
    standardised = (features - features.mean(0)) / features.std(0, correction=0)
    oracle = linear_model.Ridge(alpha=1e-2 * len(features)).fit(
        standardised.numpy(), np.eye(3)[labels.numpy()]
    )
    actual = classifier.logits(features)
    np.testing.assert_allclose(actual.numpy(), oracle.predict(standardised.numpy()), atol=1e-5)


def test_confusion_matrix_and_scores():
    labels = torch.randint(0, 6, (3, 50, 40))
    predictions = torch.where(torch.rand(3, 50, 40) < 0.6, labels, torch.randint(0, 6, (3, 50, 40)))
    labels[torch.rand(3, 50, 40) < 0.1] = 255
    keep = labels != 255
    pair = labels[keep].numpy(), predictions[keep].numpy()
    confusion = confusion_matrix(predictions, labels, 6)
    assert np.array_equal(confusion.numpy(), metrics.confusion_matrix(*pair))
    jaccard = metrics.jaccard_score(*pair, average=None)
    np.testing.assert_allclose(iou_per_class(confusion).numpy(), jaccard)
    scores = segmentation_metrics(confusion)
    expected = {
        "mIoU": jaccard.mean(),
        "aAcc": metrics.accuracy_score(*pair),
        "acc": metrics.balanced_accuracy_score(*pair),
        "fscore": metrics.f1_score(*pair, average="macro"),
        "precision": metrics.precision_score(*pair, average="macro"),
    }
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value), name


def test_accuracies():
    scores, targets = torch.randn(300, 8), torch.randint(0, 8, (300,))
    arguments = targets.numpy(), scores.numpy()
    for k in (1, 5):
        expected = metrics.top_k_accuracy_score(*arguments, k=k, labels=range(8))
        assert top_k_accuracy(scores, targets, k) == pytest.approx(expected)
    expected = metrics.balanced_accuracy_score(targets.numpy(), scores.argmax(1).numpy())
    assert mean_per_class_accuracy(scores, targets) == pytest.approx(expected)


def test_pca_projection_is_sklearns_up_to_sign():
    features = torch.randn(400, 12) * torch.linspace(3, 0.2, 12) + 7
    oracle = decomposition.PCA(3, whiten=True).fit(features.double().numpy())
    expected = oracle.transform(features.double().numpy()) * np.sqrt(400 / 399)
    actual = PatchPCA(features).project(features).numpy()
    signs = np.sign((actual * expected).sum(0))
    np.testing.assert_allclose(actual * signs, expected, atol=1e-4)
