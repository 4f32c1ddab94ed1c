"""Sinkhorn-Knopp centring of teacher logits (arXiv 2508.10104 section 3.2; arXiv 2006.09882)."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

# --- Pieces of the losses that torch.compile turns into few passes over their matrices ---
#
# The matrices of samples and prototypes are the largest tensors of a step, and each of torch's
# operators reads and writes all of one. Compiled, neighbouring operators share a pass. Collectives
# stay between the pieces. A piece is an ordinary function until :func:`compile_losses` is called.


_is_on = False


def compile_losses(is_on: bool = True) -> None:
    """Compile the pieces from now on, each when it first runs; False goes back."""
    global _is_on
    _is_on = is_on


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a piece: a function of tensors and numbers that may write to its tensors."""

    @cache
    def compiled() -> Callable[..., Any]:
        # The numbers of rows change from step to step.
        return torch.compile(function, dynamic=True)

    @wraps(function)
    def run(*arguments):
        # A matrix without rows has nothing to fuse, and would be compiled for itself.
        is_empty = any(isinstance(each, Tensor) and not each.numel() for each in arguments)
        if not _is_on or is_empty or torch.compiler.is_compiling():
            return function(*arguments)
        # A number would be compiled into the piece, and temperatures follow schedules.
        device = arguments[0].device
        return compiled()(
            *(
                torch.full((), each, device=device) if isinstance(each, float) else each
                for each in arguments
            )
        )

    return run


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
    samples cancel and need no communication. Scaling vectors absorb any factor per prototype and
    per sample, so the largest entry of each is made 1: nothing overflows and no sum vanishes,
    whatever the logits. Each iteration all-reduces one vector of length K, the start another one.

    Args:
        logits: (n, K) logits of this rank's samples, any floating dtype; left unchanged.
        temp: teacher temperature.
        num_iters: normalisation rounds; with 0 the matrix is only divided by its mean row sum.
        group: ranks that share the problem (default: all ranks, if a process group exists).

    Returns:
        (n, K) float32 probabilities without gradient; every row sums to 1 (if ``num_iters > 0``).
    """
    matrix, peaks = _scale(logits, temp)
    _all_reduce(peaks, dist.ReduceOp.MAX, group)
    if num_iters == 0:
        matrix.sub_(peaks.max()).exp_()
        return matrix.div_(_mean_row_sum(matrix, group))

    per_sample = _exponentiate_(matrix, peaks)
    for _ in range(num_iters):
        mass = torch.mv(matrix.t(), per_sample)  # (K,) mass of each prototype over all samples
        _all_reduce(mass, dist.ReduceOp.SUM, group)
        per_prototype = mass.reciprocal_()
        # The vectors' common factor is free; without this it would grow by n / K per iteration.
        per_prototype /= per_prototype.mean()
        per_sample = torch.mv(matrix, per_prototype).reciprocal_()
    return _weigh_(matrix, per_prototype, per_sample)


@fused
def _scale(logits: Tensor, temp: float | Tensor) -> tuple[Tensor, Tensor]:
    """Logits over temperature in float32, and the largest of each prototype."""
    matrix = logits.to(torch.float32, copy=True).div_(temp)
    if not len(matrix):
        return matrix, matrix.new_full(matrix.shape[1:], -torch.inf)
    return matrix, matrix.amax(0)


@fused
def _exponentiate_(matrix: Tensor, peaks: Tensor) -> Tensor:
    """Divide by the peaks of prototypes, then of samples, in the exponent; return the latter."""
    matrix.sub_(peaks)
    sample_peaks = matrix.amax(1, keepdim=True)
    matrix.sub_(sample_peaks).exp_()
    return sample_peaks.squeeze(1).exp_()


@fused
def _weigh_(matrix: Tensor, per_prototype: Tensor, per_sample: Tensor) -> Tensor:
    """Apply the scaling vectors."""
    return matrix.mul_(per_prototype).mul_(per_sample.unsqueeze(1))


def _mean_row_sum(matrix: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = torch.stack([matrix.sum(), matrix.new_full((), float(len(matrix)))])
    _all_reduce(total, dist.ReduceOp.SUM, group)
    return total[0] / total[1]


def _all_reduce(tensor: Tensor, op: dist.ReduceOp, group: dist.ProcessGroup | None) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, op=op, group=group)
