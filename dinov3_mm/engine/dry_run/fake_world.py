"""Any number of ranks in one process: tensors without storage, collectives without traffic."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_ranks(world_size: int | None, rank: int = 0) -> Iterator[None]:
    """Context in which this process is one of ``world_size`` ranks, of which no other exists.

    Args:
        world_size: number of ranks; None makes no process group.
        rank: which of them.

    Raises:
        RuntimeError: There is a process group already.
    """
    if world_size is None:
        yield
        return
    if dist.is_initialized():
        raise RuntimeError(
            "a dry run makes its own process group, but this process belongs to one already: "
            "start it without a launcher"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def fake_tensors() -> FakeTensorMode:
    """Mode in which every tensor has a shape, a dtype and a device, but no storage."""
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.ERROR)
    return FakeTensorMode(allow_non_fake_inputs=True)
