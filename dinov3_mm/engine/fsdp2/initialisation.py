"""Storage and initial values for a model that was built on the meta device and sharded.

Every rank draws each tensor whole, keeps its shard and drops the rest, so the values are those of
one process with the same seed, and no rank ever holds more than one whole tensor.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

_RANDOM = (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default)


@torch.no_grad()
def materialise(model: nn.Module, device: torch.device) -> None:
    """Give every meta tensor storage on ``device``, filled with NaN, and move all others there."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = _like(tensor, _nan(tensor, device))
    # Not by hand: modules that keep a device of their own learn of it here, such as the data
    # preprocessor, which moves every batch to it.
    model.to(device)


def _nan(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    empty = torch.empty_like(tensor, device=device)
    return empty.fill_(torch.nan) if empty.is_floating_point() else empty.zero_()


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


class WholeTensorDraws(TorchDispatchMode):
    """Context in which in-place random draws on shards give each rank its part of a whole draw."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        target = args[0] if args else None
        if func not in _RANDOM or not isinstance(target, DTensor):
            return func(*args, **(kwargs or {}))
        local = target.to_local()
        whole = torch.empty(target.shape, dtype=local.dtype, device=local.device)
        func(whole, *args[1:], **(kwargs or {}))
        part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        local.copy_(part.to_local())
        return target


def check_initialised(model: nn.Module) -> None:
    """Raise a ``RuntimeError`` that names tensors to which the initialisation gave no value."""
    left = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_floating_point() and torch.isnan(local).any():
            left.append(name)
    if left:
        raise RuntimeError(
            f"{len(left)} tensors were not initialised, e.g. {', '.join(left[:5])}: init_weights "
            "must write every parameter and buffer of a module that is built on the meta device"
        )
