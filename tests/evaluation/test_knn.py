"""k-NN beyond the oracles: chunks, clipping, chance, errors."""

import pytest
import torch

from dinov3_mm.evaluation import knn


def test_blocks_do_not_change_the_neighbours(monkeypatch):
    queries, references = torch.randn(37, 8), torch.randn(101, 8)
    similarity = (
        torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(references).T
    )
    expected = similarity.topk(20, dim=1)
    monkeypatch.setattr(knn, "QUERY_CHUNK", 5)
    monkeypatch.setattr(knn, "REFERENCE_CHUNK", 13)  # smaller than k: blocks must be merged
    values, indices = knn.nearest_neighbours(queries, references, 20)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(indices, expected.indices)


def test_separated_classes_are_perfect_and_shuffled_labels_are_not():
    labels = torch.arange(400) % 8
    features = torch.eye(8)[labels] + 0.05 * torch.randn(400, 8)
    scores = knn.knn_classify(features[:300], labels[:300], features[300:], labels[300:], (5, 20))
    assert [score.top1 for score in scores.values()] == [100.0, 100.0]
    shuffled = labels[torch.randperm(400)]
    lucky = knn.knn_classify(features[:300], shuffled[:300], features[300:], shuffled[300:], 20)
    assert lucky[20].top1 < 35 and lucky[20].top1 <= lucky[20].top5


def test_large_k_is_clipped_and_top5_needs_five_classes():
    labels = torch.tensor([0, 1, 0, 1])
    scores = knn.knn_classify(torch.randn(4, 3), labels, torch.randn(4, 3), labels, (2, 10, 200))
    assert list(scores) == [2, 4] and scores[2].top5 is None


def test_a_test_class_without_references_counts_as_wrong():
    train, test = torch.eye(3)[:2], torch.eye(3)[[0, 2]]
    scores = knn.knn_classify(train, torch.tensor([0, 1]), test, torch.tensor([0, 2]), 1)
    assert scores[1].top1 == 50.0


def test_chance_is_the_most_frequent_training_class():
    train, test = torch.tensor([0, 1, 1, 1, 2]), torch.tensor([1, 1, 0, 2])
    assert knn.chance_level(train, test) == 50.0


def test_errors_name_what_was_given():
    features, labels = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="same number of features"):
        knn.nearest_neighbours(features, torch.randn(4, 2), 1)
    with pytest.raises(ValueError, match="between 1 and the 4"):
        knn.nearest_neighbours(features, features, 5)
    with pytest.raises(ValueError, match="3 labels"):
        knn.knn_scores(features, labels[:3], features)
    with pytest.raises(ValueError, match="positive sizes"):
        knn.knn_scores(features, labels, features, ks=(0,))
    with pytest.raises(ValueError, match="not empty"):
        knn.knn_classify(features, labels, features[:0], labels[:0], 1, num_classes=2)
