"""Weights that a rank reads as far as its shards need them.

Names, shapes and dtypes of a file are known from its header. A network in shards therefore takes
its weights as :class:`UnreadTensor`, which look like meta tensors and are fetched one by one when
their target is known:

- where the file stores the tensor as it is wanted (official names, our own exports; safetensors,
  or a torch file that can be mapped), each rank reads the slice that is its shard;
- else (other layouts, other containers) the first rank reads and converts the weights, and each
  tensor is scattered from there.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from mmengine.dist import all_reduce, broadcast, broadcast_object_list, get_rank, get_world_size
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .source import OpenedCheckpoint, StoredTensor

if TYPE_CHECKING:
    from .loading import ForeignCheckpoint

_FOR_SHARDS: ContextVar[bool] = ContextVar("_FOR_SHARDS", default=False)


@contextmanager
def reading_for_shards(active: bool = True) -> Iterator[None]:
    """Context in which :func:`load_weights` returns unread tensors; all ranks must take part."""
    token = _FOR_SHARDS.set(active)
    try:
        yield
    finally:
        _FOR_SHARDS.reset(token)


def reads_for_shards() -> bool:
    """Whether the weights that are loaded are for shards on several ranks."""
    return _FOR_SHARDS.get() and get_world_size() > 1


class UnreadTensor(Tensor):
    """A meta tensor that can be fetched; what is computed from it is an ordinary meta tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(
        shape: Iterable[int], dtype: torch.dtype, fetch: Callable[[Tensor], Tensor]
    ) -> "UnreadTensor":
        """Args: what it looks like, and what reads it for a target, whole or distributed."""
        empty = torch.empty(tuple(shape), dtype=dtype, device="meta")
        tensor = Tensor._make_subclass(UnreadTensor, empty)
        tensor.fetch = fetch
        return tensor


def load_for_shards(
    opened: OpenedCheckpoint, convert: Callable[[OpenedCheckpoint], "ForeignCheckpoint"]
) -> "ForeignCheckpoint":
    """Convert a checkpoint whose tensors nobody reads yet.

    Args:
        opened: the checkpoint.
        convert: makes official tensors of what an opened checkpoint reads.
    """
    checkpoint = None if opened.stored is None else _convert_unread(opened, convert)
    return _from_first_rank(opened, convert) if checkpoint is None else checkpoint


def on_first_rank(action: Callable[[], Any]) -> Any:
    """What ``action`` returns on the first rank, None on the others; its errors reach all ranks."""
    result, errors = None, [None]
    if get_rank() == 0:
        try:
            result = action()
        except Exception as error:  # the others must fail with it instead of waiting
            errors = [error]
    broadcast_object_list(errors)
    if errors[0] is not None:
        raise errors[0]
    return result


def check_finite(fetched: dict[str, Tensor]) -> None:
    """Raise a ``ValueError`` on all ranks for values of any rank that are not finite."""
    if not fetched:
        return
    local = (t.to_local() if isinstance(t, DTensor) else t for t in fetched.values())
    broken = torch.tensor([not torch.isfinite(tensor).all() for tensor in local], dtype=torch.int32)
    all_reduce(broken, "max")
    names = [name for name, flag in zip(fetched, broken.tolist()) if flag]
    if names:
        raise ValueError(
            f"the weights hold NaN or infinite values in {len(names)} of {len(fetched)} tensors, "
            f"e.g. {', '.join(names[:5])}; nothing was loaded"
        )


def _convert_unread(
    opened: OpenedCheckpoint,
    convert: Callable[[OpenedCheckpoint], "ForeignCheckpoint"],
) -> "ForeignCheckpoint | None":
    """The conversion, if it passes every stored tensor on as it is."""
    unread: dict[str, UnreadTensor] = {}

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        found = {name: _sliced(opened.stored[name]) for name in names}
        unread.update(found)
        return found

    try:
        checkpoint = convert(replace(opened, read=read))
    except (RuntimeError, NotImplementedError):
        return None  # it asks for values, which meta tensors do not have
    parts = (checkpoint.state_dict, *checkpoint.heads.values())
    tensors = [tensor for part in parts for tensor in part.values()]
    untouched = all(not t.is_meta or isinstance(t, UnreadTensor) for t in tensors)
    # A change in place would be lost.
    untouched &= all(tensor._version == 0 for tensor in unread.values())
    return checkpoint if untouched else None


def _sliced(stored: StoredTensor) -> UnreadTensor:
    def fetch(target: Tensor) -> Tensor:
        if not isinstance(target, DTensor):
            return stored.read(tuple(slice(0, size) for size in stored.shape))
        mesh, placements = target.device_mesh, target.placements
        shape, offset = compute_local_shape_and_global_offset(target.shape, mesh, placements)
        local = stored.read(tuple(slice(o, o + n) for o, n in zip(offset, shape)))
        return DTensor.from_local(
            local.to(target.device),
            mesh,
            placements,
            run_check=False,
            shape=target.shape,
            stride=target.stride(),
        )

    return UnreadTensor.of(stored.shape, stored.dtype, fetch)


def _from_first_rank(
    opened: OpenedCheckpoint, convert: Callable[[OpenedCheckpoint], "ForeignCheckpoint"]
) -> "ForeignCheckpoint":
    """Read and convert on the first rank; the others learn what there is."""
    whole = on_first_rank(lambda: convert(opened))
    described = [None]
    if whole is not None:
        described = [_map_tensors(whole, lambda tensor: (tuple(tensor.shape), tensor.dtype))]
    broadcast_object_list(described)
    if whole is not None:
        return _map_tensors(whole, lambda tensor: _scattered(tensor.shape, tensor.dtype, tensor))
    return _map_tensors(described[0], lambda pair: _scattered(*pair, None))


def _map_tensors(checkpoint: "ForeignCheckpoint", change: Callable) -> "ForeignCheckpoint":
    return replace(
        checkpoint,
        state_dict={name: change(tensor) for name, tensor in checkpoint.state_dict.items()},
        heads={
            head: {name: change(tensor) for name, tensor in part.items()}
            for head, part in checkpoint.heads.items()
        },
    )


def _scattered(shape: Iterable[int], dtype: torch.dtype, whole: Tensor | None) -> UnreadTensor:
    def fetch(target: Tensor) -> Tensor:
        source = torch.empty(tuple(shape), dtype=dtype) if whole is None else whole
        if not isinstance(target, DTensor):
            source = source.clone()
            broadcast(source)
            return source
        source = source.to(target.device)
        return distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=0)

    return UnreadTensor.of(shape, dtype, fetch)
