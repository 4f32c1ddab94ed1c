"""An evaluation shared by ranks: who takes which rows, whose error ends it, one result for all.

What a rank does between two collectives is given to :func:`together`, so that the ranks meet again
before each collective and an error on one of them ends all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from mmengine.dist import all_gather, all_gather_object, all_reduce, get_dist_info
from torch import Tensor

Result = TypeVar("Result")


class OtherRankError(RuntimeError):
    """Another rank failed; this one had no error of its own."""


def share_of(total: int) -> range:
    """This rank's rows of ``total``: contiguous, none twice; the last ranks may have none."""
    rank, world_size = get_dist_info()
    share = -(-total // world_size)
    return range(min(rank * share, total), min((rank + 1) * share, total))


def shard_indices(total: int) -> list[int]:
    """This rank's contiguous share of ``range(total)``, equally long on all (the last repeats)."""
    rank, world_size = get_dist_info()
    share = -(-total // world_size)
    return [min(index, total - 1) for index in range(rank * share, (rank + 1) * share)]


def gather_shards(values: Tensor, total: int) -> Tensor:
    """All ranks' rows for `shard_indices` in order, without the repetitions: (total, ...)."""
    if get_dist_info()[1] == 1:
        return values
    return torch.cat(all_gather(values))[:total]


def sum_over_ranks(*values: Tensor) -> tuple[Tensor, ...]:
    """Sums of tensors over the ranks, the same on all of them; the tensors are not changed."""
    if get_dist_info()[1] == 1:
        return values
    summed = tuple(value.clone() for value in values)
    for value in summed:
        all_reduce(value)
    return summed


def together(what: str, work: Callable[[], Result]) -> Result:
    """Run work without collectives on every rank; an error on any of them is an error on all.

    Args:
        what: the work in words, for the message on the other ranks.
        work: gives this rank's result.

    Raises:
        OtherRankError: Another rank failed, named with its error. The error itself is raised on the
            rank that had it.
    """
    error, result = None, None
    try:
        result = work()
    except Exception as caught:  # raised below, when the others know
        error = caught
    if get_dist_info()[1] > 1:
        failed = torch.tensor(int(error is not None))
        all_reduce(failed, "max")
        if failed.item():
            errors = all_gather_object(
                None if error is None else f"{type(error).__name__}: {error}"
            )
            if error is None:
                rank, text = next((r, text) for r, text in enumerate(errors) if text is not None)
                raise OtherRankError(f"{what} failed on rank {rank}: {text}")
    if error is not None:
        raise error
    return result


@dataclass(frozen=True)
class Sharing:
    """Whether an evaluation is shared by the ranks, or each rank does all of it for itself.

    Attributes:
        on: shared; of no effect in one process.
    """

    on: bool

    def rows(self, total: int) -> slice:
        """The rows that this rank takes."""
        rows = share_of(total) if self.on else range(total)
        return slice(rows.start, rows.stop)

    def mine(self, number: int) -> bool:
        """Whether this rank takes the task of a number."""
        rank, world_size = get_dist_info()
        return not self.on or number % world_size == rank

    def meet(self, what: str, work: Callable[[], Result]) -> Result:
        """See :func:`together`."""
        return together(what, work) if self.on else work()

    def add(self, *values: Tensor) -> tuple[Tensor, ...]:
        """See :func:`sum_over_ranks`."""
        return sum_over_ranks(*values) if self.on else values
