"""Any number of ranks in one process: tensors without storage, collectives without traffic."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel import distributed as ddp
from torch.testing._internal.distributed.fake_pg import FakeStore

from dinov3_mm.engine.optim import optimizer as wrapper

from .fake_cuda import fake_cuda, swap_watched


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


@contextmanager
def fake_device(on_gpu: bool) -> Iterator[None]:
    """Context of tensors without storage on a machine with one GPU and NCCL, or with none.

    Compiled functions run as they are written. On the CPU nothing looks at a value either, which
    costs nothing there and is done where a GPU would not wait for it.
    """
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if dist.is_initialized():
            stack.enter_context(_fake_ddp())
            stack.enter_context(patch.object(_fsdp_param, "_chunk_with_empty", Chunks))
        if not on_gpu:
            stack.enter_context(
                patch.object(wrapper, "_is_known_to_fit", lambda norm, limit: False)
            )
            # What moves a model swaps its tensors, and fake ones are watched.
            stack.enter_context(patch.object(torch.utils, "swap_tensors", swap_watched))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        else:
            if dist.is_initialized():
                # Decides how the gradient of a gathered tensor is reduced.
                nccl = dist.Backend.NCCL
                stack.enter_context(patch.object(dist, "get_backend", lambda group=None: nccl))
            stack.enter_context(fake_cuda())
        yield


class Chunks(Sequence):
    """FSDP2's ``torch.chunk`` of a parameter, of which it looks at two chunks.

    To cut all 256 of every parameter took half of the time of a dry run of the 7B.
    """

    def __init__(self, tensor: torch.Tensor, num_chunks: int, dim: int) -> None:
        self._tensor, self._num_chunks, self._dim = tensor, num_chunks, dim

    def __len__(self) -> int:
        return self._num_chunks

    def __getitem__(self, index: int) -> torch.Tensor:
        size = self._tensor.shape[self._dim]
        step = -(-size // self._num_chunks)
        start = index * step
        if start >= size:
            return self._tensor.new_empty(0)
        return self._tensor.narrow(self._dim, start, min(step, size - start))


@contextmanager
def _fake_ddp() -> Iterator[None]:
    """Context in which torch's DDP can be built of tensors without storage in a fake process group.

    What reads values is left out: the comparison of parameters over ranks, their first broadcast
    and the exchange of bucket sizes.
    """
    wrap = DistributedDataParallel.__init__

    def wrap_fake(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        wrap(self, *args, **{**kwargs, "init_sync": False})
        self.register_comm_hook(None, _all_reduce_bucket)
        self.reducer = _FixedBuckets(self.reducer)

    with (
        patch.object(DistributedDataParallel, "__init__", wrap_fake),
        patch.object(ddp, "_verify_param_shape_across_processes", lambda *_: None),
    ):
        yield


def _all_reduce_bucket(_state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's own all-reduce; a fake process group has no future of it."""
    dist.all_reduce(bucket.buffer())
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


class _FixedBuckets:
    """DDP's reducer, without the exchange of bucket sizes, which reads values."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False
