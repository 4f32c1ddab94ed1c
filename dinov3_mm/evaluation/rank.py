"""Effective rank of a feature matrix: how many directions a representation really uses."""

from torch import Tensor

from dinov3_mm.models.pretraining.diagnostics import feature_rank


def effective_rank(features: Tensor) -> float:
    """RankMe (arXiv 2210.02885): exponential of the entropy of the normalised singular values.

    Args:
        features: (N, D) features of N images, uncentred; N should exceed D for a full reading.

    Returns:
        A number between 1 (all features on one line, a collapse) and min(N, D).

    Raises:
        ValueError: if the matrix is empty or no matrix.
    """
    if features.ndim != 2 or not features.numel():
        raise ValueError(f"features must be a non-empty (N, D) matrix, got {tuple(features.shape)}")
    return feature_rank(features).item()
