"""Weighted ridge regression in closed form from sufficient statistics."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .ranks import Sharing

ROW_CHUNK = 65536


@dataclass
class RidgeStatistics:
    """Weighted sums that determine a ridge regression of targets Y (N, C) on features X (N, D).

    Kept in float64. Statistics of disjoint parts add up, so a fit on their union costs no second
    pass over the features.
    """

    weight: Tensor  # () sum of the sample weights w
    feature_sum: Tensor  # (D,) sum of w x
    target_sum: Tensor  # (C,) sum of w y
    gram: Tensor  # (D, D) sum of w x x^T
    cross: Tensor  # (D, C) sum of w x y^T

    @classmethod
    def of_classes(
        cls, features: Tensor, labels: Tensor, class_weights: Tensor
    ) -> "RidgeStatistics":
        """Statistics for one-hot targets of ``labels`` (N,), samples weighted by their class.

        Args:
            features: (N, D).
            labels: (N,) int64 in [0, C).
            class_weights: (C,) positive.
        """
        dims, num_classes = features.shape[1], len(class_weights)
        gram = torch.zeros(dims, dims, dtype=torch.float64, device=features.device)
        cross = torch.zeros(num_classes, dims, dtype=torch.float64, device=features.device)
        # Products in fp32 by chunk, sums of chunks in fp64: fast, and precise once means cancel.
        for rows, classes in zip(features.split(ROW_CHUNK), labels.split(ROW_CHUNK)):
            weighted = rows * class_weights[classes, None].to(rows)
            gram += (rows.T @ weighted).double()
            cross += rows.new_zeros(num_classes, dims).index_add_(0, classes, weighted).double()
        own = class_weights.to(features.device, torch.float64)
        counts = torch.zeros_like(own).index_add_(0, labels, own[labels])
        return cls(counts.sum(), cross.sum(dim=0), counts, gram, cross.T)

    def __add__(self, other: "RidgeStatistics") -> "RidgeStatistics":
        return RidgeStatistics(
            self.weight + other.weight,
            self.feature_sum + other.feature_sum,
            self.target_sum + other.target_sum,
            self.gram + other.gram,
            self.cross + other.cross,
        )

    def over(self, ranks: Sharing) -> "RidgeStatistics":
        """The sum over ranks that share the samples."""
        parts = (self.weight, self.feature_sum, self.target_sum, self.gram, self.cross)
        return RidgeStatistics(*ranks.add(*parts))

    @property
    def mean_variance(self) -> Tensor:
        """Weighted variance of the features, averaged over the D of them."""
        mean = self.feature_sum / self.weight
        return (self.gram.diagonal() / self.weight - mean.square()).clamp_min(0).mean()

    def solve(self, alpha: float | Tensor) -> tuple[Tensor, Tensor]:
        """Minimise sum of w |y - xW - b|^2 + alpha |W|^2: weights (D, C) and intercept (C,)."""
        mean, target_mean = self.feature_sum / self.weight, self.target_sum / self.weight
        covariance = self.gram - self.weight * torch.outer(mean, mean)
        cross = self.cross - self.weight * torch.outer(mean, target_mean)
        covariance.diagonal().add_(alpha)
        weight = torch.linalg.solve(covariance, cross)
        return weight, target_mean - mean @ weight
