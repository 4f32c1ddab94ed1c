"""Effective rank of a feature matrix: how many directions a representation really uses."""

import torch
from torch import Tensor


def effective_rank(features: Tensor, eps: float = 1e-7) -> float:
    """RankMe (Garrido et al. 2023): exponential of the entropy of the normalised singular values.

    Args:
        features: (N, D) features of N images, uncentred; N should exceed D for a full reading.
        eps: added to each share, as in the paper, so that zero singular values stay defined.

    Returns:
        A number between 1 (all features on one line, a collapse) and min(N, D).
    """
    if features.ndim != 2 or not features.numel():
        raise ValueError(f"features must be a non-empty (N, D) matrix, got {tuple(features.shape)}")
    singular = torch.linalg.svdvals(features.double())
    shares = singular / singular.sum().clamp_min(torch.finfo(torch.double).tiny) + eps
    return torch.exp(-(shares * shares.log()).sum()).item()
