"""How healthy a self-supervised representation is: pure functions of one batch.

With several ranks, ``gather_rows`` first gives each the rows of all.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F


@torch.no_grad()
def gather_rows(x: Tensor) -> Tensor:
    """Concatenate the rows of all ranks (equal counts) in rank order; ``x`` without ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def assignment_entropy(probs: Tensor) -> Tensor:
    """Mean entropy of the assignment of a sample to prototypes, in nats.

    Args:
        probs: (n, K), rows sum to 1.

    Returns:
        Scalar in [0, ln K]. At ln K every target is uniform: with Sinkhorn-Knopp centring that is
        what equal features for all images lead to.
    """
    return torch.special.entr(probs.float()).sum(-1).mean()


@torch.no_grad()
def prototype_usage(choices: Tensor, num_prototypes: int) -> Tensor:
    """Number of distinct prototypes that are some sample's first choice, over min(n, K).

    Args:
        choices: (n,) int64 index of each sample's first choice.
        num_prototypes: K.

    Returns:
        Scalar in (0, 1]: 1 when no two samples share a first choice, or all prototypes are chosen.
    """
    chosen = torch.zeros(num_prototypes, device=choices.device)
    return chosen.index_fill_(0, choices, 1.0).sum() / min(len(choices), num_prototypes)


@torch.no_grad()
def feature_rank(features: Tensor) -> Tensor:
    """RankMe effective rank (arXiv 2210.02885): exp of the entropy of the singular values' shares.

    Args:
        features: (n, D), uncentred.

    Returns:
        Scalar between 1 (all features on one line) and min(n, D); NaN for features that are not
        finite.
    """
    features = features.float()
    # The decomposition raises where a non-finite step should be reported and skipped.
    singular = torch.linalg.svdvals(features.nan_to_num(0.0, posinf=0.0, neginf=0.0))
    shares = singular / singular.sum().clamp_min(torch.finfo(torch.float32).tiny)
    rank = torch.special.entr(shares).sum().exp()
    return torch.where(features.isfinite().all(), rank, torch.nan)


@torch.no_grad()
def feature_spread(features: Tensor) -> Tensor:
    """Mean over the axes of the standard deviation of the L2-normalised features.

    Args:
        features: (n, D).

    Returns:
        Scalar between 0 (all equal) and 1/sqrt(D) (spread evenly over the sphere).
    """
    unit = F.normalize(features.float(), dim=-1)
    return unit.std(dim=0, correction=0).mean()


@torch.no_grad()
def patch_cls_cosine(cls: Tensor, patches: Tensor) -> Tensor:
    """Mean cosine between the patches of an image and its CLS token.

    Near 1 the patches have lost what is local to them.

    Args:
        cls: (n, D).
        patches: (n, N, D).
    """
    unit_cls = F.normalize(cls.float(), dim=-1).unsqueeze(1)
    return (F.normalize(patches.float(), dim=-1) * unit_cls).sum(-1).mean()


@torch.no_grad()
def diagnose(
    cls: Tensor, patches: Tensor, probs: Tensor | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All diagnostics of the teacher's view of the global crops.

    Args:
        cls: (n, D) CLS tokens.
        patches: (n, N, D) patch tokens.
        probs: (n, K) Sinkhorn-Knopp assignments of the CLS tokens, of several teachers by name.

    Returns:
        Scalars over the batch of all ranks: ``diag/prototype_usage``, ``diag/feature_rank`` and
        ``diag/cls_spread``; over this rank's images, to be averaged over ranks:
        ``diag/teacher_entropy`` with its bound ``diag/teacher_entropy_max`` (ln K), and
        ``diag/patch_cls_cosine``. With several teachers what is about assignments is the mean over
        them, and that of each is ``diag/NAME/...``.
    """
    features = gather_rows(cls.float())
    return {
        **_of_assignments(probs),
        "diag/feature_rank": feature_rank(features),
        "diag/cls_spread": feature_spread(features),
        "diag/patch_cls_cosine": patch_cls_cosine(cls, patches),
    }


def _of_assignments(probs: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(probs, Mapping):
        each = {name: _of_assignments(own) for name, own in probs.items()}
        keys = next(iter(each.values()))
        means = {key: torch.stack([own[key] for own in each.values()]).mean() for key in keys}
        apart = {
            f"diag/{name}/{key.removeprefix('diag/')}": value
            for name, own in each.items()
            for key, value in own.items()
        }
        return {**means, **apart}
    num_prototypes = probs.shape[1]
    return {
        "diag/teacher_entropy": assignment_entropy(probs),
        "diag/teacher_entropy_max": probs.new_full((), math.log(num_prototypes)),
        "diag/prototype_usage": prototype_usage(gather_rows(probs.argmax(-1)), num_prototypes),
    }


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
