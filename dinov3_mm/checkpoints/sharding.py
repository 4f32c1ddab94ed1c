"""Whole tensors to shards and back, for models whose parameters are distributed tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from .unread import UnreadTensor, check_finite


def shard_like(whole: Tensor, target: Tensor) -> Tensor:
    """What a rank keeps of a tensor that it holds whole: itself, or its shard if the target is one.

    Every rank must call this with the same values; nothing is sent. An unread tensor is read as far
    as the target needs it.
    """
    if isinstance(whole, UnreadTensor):
        return whole.fetch(target)
    if not isinstance(target, DTensor) or isinstance(whole, DTensor):
        return whole
    return distribute_tensor(
        whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )


def shard_state(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """:func:`shard_like` for a state dict; names that the target lacks stay as they are.

    Raises:
        ValueError: values of unread tensors that are not finite.
    """
    unread = [n for n, t in state.items() if isinstance(t, UnreadTensor) and n in target]
    shards = {
        name: shard_like(tensor, target[name]) if name in target else tensor
        for name, tensor in state.items()
    }
    check_finite({name: shards[name] for name in unread})
    return shards


@torch.no_grad()
def gather_whole(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU. For a distributed tensor all its ranks must take part."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu()
