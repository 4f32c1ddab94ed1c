"""Sinkhorn-Knopp centring of teacher logits (arXiv 2508.10104 section 3.2; arXiv 2006.09882)."""

import torch
import torch.distributed as dist
from torch import Tensor

# The largest scaled logit is moved here before the exponential. exp() then neither overflows for
# any logits nor loses the entries that are up to exp(-127) times smaller than the largest.
PEAK = 40.0


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor,
    temp: float,
    *,
    num_iters: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Assign samples to prototypes with (nearly) equal mass per prototype.

    The matrix ``exp(logits / temp)`` of the samples of all ranks is normalised alternately per
    prototype and per sample. Ranks may hold different numbers of samples, also none. The iteration
    runs on two scaling vectors, so the matrix is only read; its total mass and the number of
    samples cancel and need no communication. Each iteration all-reduces one vector of length K.

    Args:
        logits: (n, K) logits of this rank's samples, any floating dtype; left unchanged.
        temp: teacher temperature.
        num_iters: normalisation rounds; with 0 the matrix is only divided by its mean row sum.
        group: ranks that share the problem (default: all ranks, if a process group exists).

    Returns:
        (n, K) float32 probabilities without gradient; every row sums to 1 (if ``num_iters > 0``).
    """
    matrix = logits.to(torch.float32, copy=True).div_(temp)
    peak = matrix.max() if len(matrix) else matrix.new_full((), -torch.inf)
    _all_reduce(peak, dist.ReduceOp.MAX, group)
    matrix.sub_(peak - PEAK).exp_()
    if num_iters == 0:
        return matrix.div_(_mean_row_sum(matrix, group))

    per_sample = matrix.new_ones(matrix.shape[0])
    for _ in range(num_iters):
        mass = torch.mv(matrix.t(), per_sample)  # (K,) mass of each prototype over all samples
        _all_reduce(mass, dist.ReduceOp.SUM, group)
        per_prototype = mass.reciprocal_()
        per_sample = torch.mv(matrix, per_prototype).reciprocal_()
    return matrix.mul_(per_prototype).mul_(per_sample.unsqueeze(1))


def _mean_row_sum(matrix: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = torch.stack([matrix.sum(), matrix.new_tensor(float(len(matrix)))])
    _all_reduce(total, dist.ReduceOp.SUM, group)
    return total[0] / total[1]


def _all_reduce(tensor: Tensor, op: dist.ReduceOp, group: dist.ProcessGroup | None) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, op=op, group=group)
