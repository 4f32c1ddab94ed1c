"""KoLeo regulariser: spreads the features of a batch over the sphere (arXiv 1806.03198)."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8


def koleo_loss(
    features: Tensor,
    *,
    topk: int = 1,
    distributed: bool = False,
    loss_group_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Minus the mean log distance of each feature to its nearest neighbours among the other images.

    Args:
        features: (..., B, D), any floating dtype; leading axes (crops) are separate problems whose
            losses are averaged. Computed in float32.
        topk: number of neighbours; more than 1 needs ``distributed=True``.
        distributed: search neighbours among the features of all ranks. Gradients flow through the
            gathered features as well: each rank receives the sum of all ranks' contributions.
        loss_group_size: with ``distributed``, only this many consecutive images of the global batch
            are candidates; a multiple of the batch per rank that divides the global batch.
        group: ranks that are gathered (default: all ranks, if a process group exists).

    Returns:
        Float32 scalar.

    Raises:
        ValueError: too few images for ``topk`` neighbours, or an impossible ``loss_group_size``.
    """
    if not distributed and (topk != 1 or loss_group_size is not None):
        raise ValueError(
            f"koleo_loss with topk={topk} and loss_group_size={loss_group_size} needs "
            "distributed=True; the local version uses one neighbour among the rank's own batch"
        )
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1, eps=EPS)
        candidates, own = unit, 0
        if distributed:
            candidates, own = _gather_candidates(unit, loss_group_size, group)
        if candidates.shape[-2] <= topk:
            raise ValueError(
                f"koleo_loss needs more than topk={topk} images to find neighbours in, got "
                f"{candidates.shape[-2]}: raise the batch per rank or set distributed=True, or set "
                "the KoLeo weight to 0"
            )
        neighbours = _nearest(unit, candidates, own, topk)  # (..., B, topk, D)
        distances = F.pairwise_distance(unit.unsqueeze(-2), neighbours, eps=EPS)
        return -torch.log(distances + EPS).mean()


@torch.no_grad()
def _nearest_indices(unit: Tensor, candidates: Tensor, own: int, topk: int) -> Tensor:
    similarity = unit @ candidates.transpose(-1, -2)  # (..., B, candidates)
    similarity.diagonal(offset=own, dim1=-2, dim2=-1).fill_(-1)
    return similarity.topk(topk, dim=-1).indices


def _nearest(unit: Tensor, candidates: Tensor, own: int, topk: int) -> Tensor:
    """Return the ``topk`` candidates of largest cosine per row, the row itself excluded."""
    indices = _nearest_indices(unit, candidates, own, topk)
    flat = indices.flatten(-2).unsqueeze(-1).expand(*indices.shape[:-2], -1, unit.shape[-1])
    return candidates.gather(-2, flat).unflatten(-2, indices.shape[-2:])


def _gather_candidates(
    unit: Tensor, loss_group_size: int | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, int]:
    """Return the candidate features of this rank's loss group and the offset of its own rows."""
    active = dist.is_available() and dist.is_initialized()
    world, rank = (dist.get_world_size(group), dist.get_rank(group)) if active else (1, 0)
    batch = unit.shape[-2]
    size = batch * world if loss_group_size is None else loss_group_size
    if size < 1 or size % batch or (batch * world) % size:
        raise ValueError(
            f"koleo loss_group_size={size} must be a multiple of the batch per rank ({batch}) and "
            f"divide the global batch ({batch * world})"
        )
    if world == 1:
        return unit, 0
    ranks = size // batch
    first = rank // ranks * ranks
    gathered = dist_nn.all_gather(unit.contiguous(), group=group or dist.group.WORLD)
    return torch.cat(gathered[first : first + ranks], dim=-2), (rank - first) * batch
