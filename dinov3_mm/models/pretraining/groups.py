"""Groups of ranks that train one student each, and what travels between them.

Every rank reads its own images and shows them to the teacher; every student learns from the whole
global batch. :func:`share` brings the images and the teacher's features of all ranks to the ranks
of a student.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_NAME = re.compile(r"[A-Za-z]\w*")


@dataclass(frozen=True)
class StudentRanks:
    """Where a student is trained.

    Attributes:
        ranks: its ranks in the world; None for all, without exchange.
        index: position of this rank among them, None on other ranks.
    """

    ranks: tuple[int, ...] | None
    index: int | None

    @property
    def is_local(self) -> bool:
        """Whether this rank trains the student."""
        return self.index is not None


def check_name(name: str, what: str) -> None:
    """Raise a ``ValueError`` for what cannot be the name of a student or teacher."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be the name of a {what}: use letters, digits and underscores"
        )


def place_students(given: Mapping[str, Sequence[int] | None]) -> dict[str, StudentRanks]:
    """Place students on the ranks of the process group.

    One process trains all students in turn, and so do several if no student has ranks.

    Args:
        given: by name, the first rank and the one past the last, or None.

    Raises:
        ValueError: a bad name, some students with and some without ranks, or ranks that are not
            each rank of the world exactly once.
    """
    for name in given:
        check_name(name, "student")
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if world == 1 or not any(given.values()):
        return {name: StudentRanks(None, rank) for name in given}
    without = [name for name, ranks in given.items() if ranks is None]
    if without:
        raise ValueError(
            f"students {without} have no ranks, the others have: give all of them ranks, or none"
        )
    placed = {name: tuple(range(*ranks)) for name, ranks in given.items()}
    if sorted(r for ranks in placed.values() for r in ranks) != list(range(world)):
        raise ValueError(
            f"{world} processes, but the students' ranks are "
            f"{ {name: tuple(ranks) for name, ranks in given.items()} } (first, and one past the "
            f"last): together they must be 0 to {world - 1}, each once. Leave ranks out to train "
            "all students on every process"
        )
    return {
        name: StudentRanks(ranks, ranks.index(rank) if rank in ranks else None)
        for name, ranks in placed.items()
    }


def share(x: Tensor, dim: int, length: int, *, index: int, size: int) -> Tensor:
    """This rank's part of what all ranks hold together.

    Args:
        x: this rank's piece, equally large on all ranks.
        dim: axis of the images.
        length: images to keep of all ranks' together, in rank order; the rest is surplus.
        index: position of this rank in its group.
        size: ranks of the group, among which the kept images are cut into equal parts.
    """
    pieces = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, x.contiguous())
    part = length // size
    return torch.cat(pieces, dim).narrow(dim, index * part, part).contiguous()


def share_crops(crops: Tensor, num_crops: int, length: int, *, index: int, size: int) -> Tensor:
    """:func:`share` of crop-major rows (crops * B, ...)."""
    by_crop = crops.unflatten(0, (num_crops, -1))
    return share(by_crop, 1, length, index=index, size=size).flatten(0, 1)


@contextmanager
def group_as_world(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Make a group the default one, so that code which knows nothing of groups works within it.

    Ranks, world size and collectives without a group of their own are then those of ``group``, on
    all its ranks, which must enter and leave together. None changes nothing.
    """
    if group is None:
        yield
        return
    world = dist.group.WORLD
    dist.group.WORLD = group
    try:
        yield
    finally:
        dist.group.WORLD = world
