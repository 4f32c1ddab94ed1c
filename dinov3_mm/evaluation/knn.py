"""Weighted k-nearest-neighbour classification of frozen features."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_mm.features.frozen import Sharing

# Rows of a similarity block: queries x references never exceeds 4 M values (16 MB in fp32).
QUERY_CHUNK = 512
REFERENCE_CHUNK = 8192


@dataclass(frozen=True)
class KNNScore:
    """Accuracy in percent of one neighbourhood size; ``top5`` is None below five classes."""

    k: int
    top1: float
    top5: float | None


def nearest_neighbours(
    queries: Tensor, references: Tensor, k: int, normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Cosine similarities and indices (Q, k) of the ``k`` best references, best first.

    Args:
        queries: (Q, D) features.
        references: (R, D) features on the same device.
        k: number of neighbours, at most R.
        normalize: L2-normalise both sides first (dot products otherwise).

    The (Q, R) similarity matrix is never built whole: blocks of it are reduced to their best ``k``.
    """
    if queries.ndim != 2 or references.ndim != 2 or queries.shape[1] != references.shape[1]:
        raise ValueError(
            f"queries {tuple(queries.shape)} and references {tuple(references.shape)} must be "
            "(samples, features) with the same number of features"
        )
    if not 1 <= k <= len(references):
        raise ValueError(f"k must be between 1 and the {len(references)} references, got {k}")
    queries, references = queries.float(), references.float()
    if normalize:
        queries, references = F.normalize(queries, dim=1), F.normalize(references, dim=1)
    rows = [_best_of_blocks(chunk, references, k) for chunk in queries.split(QUERY_CHUNK)]
    if not rows:
        empty = queries.new_empty(0, k)
        return empty, empty.long()
    return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])


def _best_of_blocks(queries: Tensor, references: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = indices = None
    for start in range(0, len(references), REFERENCE_CHUNK):
        block = queries @ references[start : start + REFERENCE_CHUNK].T
        values, positions = block.topk(min(k, block.shape[1]), dim=1)
        positions = positions + start
        if best is not None:
            values, positions = torch.cat([best, values], 1), torch.cat([indices, positions], 1)
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            positions = positions.gather(1, order)
        best, indices = values, positions
    return best, indices


def knn_scores(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    num_classes: int | None = None,
    temperature: float = 0.07,
    skip_first: bool = False,
    normalize: bool = True,
) -> dict[int, Tensor]:
    """Class scores (Q, C) of every neighbourhood size, by temperature-weighted votes.

    The weights are a softmax of similarity / ``temperature`` over the ``max(ks)`` nearest
    references, computed once; the score of a class for k is the sum of the weights of its
    references among the first k, not renormalised. DINO, DINOv2 and DINOv3 report this protocol.

    Args:
        train_features: (R, D).
        train_labels: (R,) class indices, or (R, C) multi-hot.
        test_features: (Q, D).
        ks: neighbourhood sizes; those above R are clipped to R, duplicates drop out.
        num_classes: C; by default the largest label + 1 (multi-hot: the number of columns).
        skip_first: leave out the nearest reference (test images that are also references).
    """
    if len(train_labels) != len(train_features):
        raise ValueError(
            f"{len(train_features)} train features but {len(train_labels)} labels: one label each"
        )
    available = len(train_features) - int(skip_first)
    ks = sorted({min(int(k), available) for k in ks})
    if not ks or ks[0] < 1:
        raise ValueError(f"ks must be positive sizes of a non-empty train set, got {ks}")
    similarity, indices = nearest_neighbours(
        test_features, train_features, ks[-1] + int(skip_first), normalize
    )
    if skip_first:
        similarity, indices = similarity[:, 1:], indices[:, 1:]
    weights = F.softmax(similarity / temperature, dim=1)
    if train_labels.ndim == 1:
        classes = int(num_classes or train_labels.max() + 1)
        votes = train_labels.to(indices.device, torch.long)[indices]  # (Q, K)
    else:
        classes = train_labels.shape[1]
        votes = train_labels.to(indices.device, torch.float32)[indices]  # (Q, K, C)
    scores, total, done = {}, weights.new_zeros(len(weights), classes), 0
    for k in ks:
        part = slice(done, k)
        if votes.ndim == 2:
            total = total.scatter_add(1, votes[:, part], weights[:, part])
        else:
            total = total + torch.einsum("qk,qkc->qc", weights[:, part], votes[:, part])
        scores[k], done = total, k
    return scores


def knn_hits(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    ks: Sequence[int],
    num_classes: int,
    temperature: float = 0.07,
) -> Tensor:
    """How many test rows have their class first, and among the first five, by neighbourhood size.

    Nothing is read back from the device.

    Args:
        train_features, train_labels, test_features, ks, num_classes, temperature: see `knn_scores`.
        test_labels: (Q,) class indices; Q may be 0.

    Returns:
        (sizes, 2) int64, in the order of `knn_scores`.
    """
    scores = knn_scores(
        train_features,
        train_labels,
        test_features,
        ks=ks,
        num_classes=num_classes,
        temperature=temperature,
    )
    targets = test_labels.to(test_features.device)[:, None]
    hits = []
    for score in scores.values():
        best = (score.topk(min(k, num_classes), dim=1).indices for k in (1, 5))
        hits += [(found == targets).sum() for found in best]
    return torch.stack(hits).view(-1, 2)


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int | Sequence[int] = (10, 20),
    temperature: float = 0.07,
    *,
    num_classes: int | None = None,
    shared: bool = False,
) -> dict[int, KNNScore]:
    """Top-1 (and top-5 from five classes on) accuracy in percent for each ``k``.

    Labels are (N,) class indices. See `knn_scores` for the voting rule.

    Args:
        train_features, test_features: (R, D) and (Q, D) on one device, where everything is
            computed; only the final counts are read back.
        train_labels, test_labels: of all rows.
        k, temperature, num_classes: see `knn_scores`.
        shared: every rank holds all rows and classifies its share of the test rows; the counts are
            added up, so that all ranks get the result that one process would get.

    Raises:
        ValueError: if numbers of features and labels differ, or a set is empty.
    """
    if test_features.ndim != 2 or len(test_features) != len(test_labels) or not len(test_labels):
        raise ValueError(
            f"test features {tuple(test_features.shape)} must be (samples, features), not empty, "
            f"with one label each, got {tuple(test_labels.shape)}"
        )
    if num_classes is None:
        num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    ks = (k,) if isinstance(k, int) else k
    ranks, total = Sharing(shared), len(test_labels)
    own = ranks.rows(total)

    def count() -> Tensor:
        return knn_hits(
            train_features,
            train_labels,
            test_features[own],
            test_labels[own],
            ks,
            num_classes,
            temperature,
        )

    (hits,) = ranks.add(ranks.meet("k-NN", count))
    sizes = sorted({min(int(size), len(train_features)) for size in ks})
    shares = [[100 * (count / total) for count in pair] for pair in hits.tolist()]
    return {
        size: KNNScore(size, first, five if num_classes >= 5 else None)
        for size, (first, five) in zip(sizes, shares, strict=True)
    }


def chance_level(train_labels: Tensor, test_labels: Tensor) -> float:
    """Accuracy in percent of always answering the most frequent training class."""
    majority = torch.bincount(train_labels).argmax()
    return 100 * (test_labels == majority).double().mean().item()
