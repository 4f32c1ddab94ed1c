"""How student and teacher are compared through their prototypes: whole, or in chunks of them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..losses import dino_loss, ibot_loss, sinkhorn_knopp
from ..losses.chunked_prototypes import (
    ChunkedAssignments,
    chunked_cross_entropy,
    sinkhorn_assignments,
)
from .head import DINOv3Head

NUM_GLOBAL_CROPS = 2


class WholeComparison:
    """Logits (n, K) of all samples at once; teacher probabilities of the same shape."""

    chunk_size = None

    def scores(self, head: DINOv3Head, features: Tensor) -> Tensor:
        """Logits of features (n, D)."""
        return head(features)

    def projected_scores(self, head: DINOv3Head, projected: Tensor) -> Tensor:
        """Logits of bottleneck features (n, b)."""
        return head.last_layer(projected)

    def split(self, scores: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Rows of the scores, apart."""
        return scores.split(sizes)

    def assignments(self, scores: Tensor, temp: float | Tensor) -> Tensor:
        """Centred probabilities of the teacher's scores."""
        return sinkhorn_knopp(scores, temp)

    def probabilities(self, assignments: Tensor) -> Tensor:
        """Assignments as a matrix (n, K)."""
        return assignments

    def dino(
        self,
        scores: Tensor,
        assignments: Tensor,
        *,
        num_crops: int,
        student_temp: float,
        ignore_diagonal: bool = False,
    ) -> Tensor:
        """DINO loss of crop-major scores (crops * B) against those of the two global crops."""
        return dino_loss(
            scores.unflatten(0, (num_crops, -1)),
            assignments.unflatten(0, (NUM_GLOBAL_CROPS, -1)),
            student_temp=student_temp,
            ignore_diagonal=ignore_diagonal,
        )

    def ibot(
        self,
        scores: Tensor,
        assignments: Tensor,
        weights: Tensor,
        num_images: int,
        *,
        student_temp: float,
    ) -> Tensor:
        """IBOT loss of the masked patches."""
        return ibot_loss(scores, assignments, weights, num_images, student_temp=student_temp)

    def combine(self, losses: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], dict]:
        """The losses of all teachers, and those of each: there is one."""
        return losses, {}


class Projections(NamedTuple):
    """What logits are the product of: bottleneck features (n, b) and prototypes (K, b)."""

    features: Tensor
    prototypes: Tensor


class ChunkedComparison:
    """The same losses without any matrix of K columns.

    Args:
        chunk_size: prototypes handled at a time.

    Raises:
        ValueError: ``chunk_size`` below 1.
    """

    def __init__(self, chunk_size: int) -> None:
        if chunk_size < 1:
            raise ValueError(f"prototype_chunk_size must be at least 1, got {chunk_size}")
        self.chunk_size = chunk_size

    def scores(self, head: DINOv3Head, features: Tensor) -> Projections:
        """Bottleneck features and prototypes, in the dtype in which the head computes."""
        return Projections(*head.project_and_prototypes(features))

    def projected_scores(self, head: DINOv3Head, projected: Tensor) -> Projections:
        """The same of bottleneck features (n, b)."""
        return Projections(projected, head.last_layer.weight.to(projected.dtype))

    def split(self, scores: Projections, sizes: tuple[int, ...]) -> tuple[Projections, ...]:
        """Rows of the scores, apart."""
        return tuple(Projections(part, scores.prototypes) for part in scores.features.split(sizes))

    def assignments(self, scores: Projections, temp: float | Tensor) -> ChunkedAssignments:
        """Centred probabilities of the teacher's scores, as scaling vectors."""
        return sinkhorn_assignments(*scores, temp, chunk_size=self.chunk_size)

    def probabilities(self, assignments: ChunkedAssignments) -> Tensor:
        """Assignments as a matrix (n, K)."""
        return assignments.chunk(slice(None))

    def dino(
        self,
        scores: Projections,
        assignments: ChunkedAssignments,
        *,
        num_crops: int,
        student_temp: float,
        ignore_diagonal: bool = False,
    ) -> Tensor:
        """See :meth:`WholeComparison.dino`."""
        features = scores.features.unflatten(0, (num_crops, -1))
        pairs = torch.ones(num_crops, NUM_GLOBAL_CROPS, device=features.device)
        if ignore_diagonal:
            pairs.fill_diagonal_(0.0)
        kept = num_crops * NUM_GLOBAL_CROPS - ignore_diagonal * min(num_crops, NUM_GLOBAL_CROPS)
        num_images = features.shape[1]
        weights = torch.full((num_images,), 1.0 / (num_images * kept), device=features.device)
        return self._cross_entropy(
            features, scores.prototypes, assignments, pairs, weights, student_temp
        )

    def ibot(
        self,
        scores: Projections,
        assignments: ChunkedAssignments,
        weights: Tensor,
        num_images: int,
        *,
        student_temp: float,
    ) -> Tensor:
        """See :meth:`WholeComparison.ibot`."""
        pairs = torch.ones(1, 1, device=weights.device)
        return self._cross_entropy(
            scores.features[None],
            scores.prototypes,
            assignments,
            pairs,
            weights.float() / num_images,
            student_temp,
        )

    def combine(self, losses: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], dict]:
        """See :meth:`WholeComparison.combine`."""
        return losses, {}

    def _cross_entropy(self, *arguments) -> Tensor:
        return chunked_cross_entropy(*arguments, chunk_size=self.chunk_size)


Comparison = WholeComparison | ChunkedComparison


def build_comparison(prototype_chunk_size: int | None) -> Comparison:
    """In chunks of so many prototypes, or whole."""
    if prototype_chunk_size is None:
        return WholeComparison()
    return ChunkedComparison(prototype_chunk_size)
