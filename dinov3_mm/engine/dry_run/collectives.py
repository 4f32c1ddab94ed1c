"""Which collectives a step makes, what for, and how large they are."""

import sys
from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operator: name, and which argument has the size of what all ranks hold together.
_OPERATORS = {
    "c10d._allgather_base_": ("all-gather", 0),
    "c10d.allgather_": ("all-gather", 0),
    "c10d.allgather_into_tensor_coalesced_": ("all-gather", 0),
    "c10d._reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d.reduce_scatter_": ("reduce-scatter", 1),
    "c10d.allreduce_": ("all-reduce", 0),
    "c10d.broadcast_": ("broadcast", 0),
    "c10d.alltoall_": ("all-to-all", 0),
    "c10d.alltoall_base_": ("all-to-all", 0),
    "_c10d_functional.all_reduce": ("all-reduce", 0),
    "_c10d_functional.all_gather_into_tensor": ("all-gather", None),
    "_c10d_functional.reduce_scatter_tensor": ("reduce-scatter", 0),
}
# File of the collectives that have a gradient.
_DIFFERENTIABLE = "distributed/nn/functional"
# Part of the file that asked for it: purpose.
_PURPOSES = {
    "losses/sinkhorn": "Sinkhorn-Knopp",
    "losses/prototypes": "Sinkhorn-Knopp",
    "losses/koleo": "KoLeo",
    "pretraining/groups": "crops and features of all ranks",
    "optim/optimizer": "gradient norm",
    "_fsdp_collectives": "parameters and gradients (FSDP2)",
    "dry_run/fake_world": "gradients (DDP)",
    "pretraining/diagnostics": "diagnosis",
}


@dataclass(frozen=True)
class Collective:
    """One kind of collective.

    Attributes:
        operation: 'all-gather', 'reduce-scatter', 'all-reduce' ...
        purpose: what it is for.
        phase: part of the step.
        dtype: of the tensors.
        ranks: that take part.
    """

    operation: str
    purpose: str
    phase: str
    dtype: torch.dtype
    ranks: int


class CollectiveLog(TorchDispatchMode):
    """Counts the collectives that are called, and their bytes.

    Attributes:
        counts: calls.
        sizes: bytes of the whole tensors: what an all-gather ends with, a reduce-scatter starts
            with, an all-reduce sums.
        phase: part of the step that the next calls belong to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Collective] = Counter()
        self.sizes: Counter[Collective] = Counter()
        self.phase = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return func(*args)  # asked more often than all else
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        known = _OPERATORS.get(f"{func.namespace}.{func._schema.name.split('::')[1]}")
        if known is not None:
            tensors = out if known[1] is None else args[known[1]]
            self._count(known[0], tensors, _num_ranks(args))
        return out

    def _count(self, operation: str, tensors: object, ranks: int) -> None:
        whole = [leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)]
        backward = torch._C._current_graph_task_id() != -1
        phase = self.phase.replace("forward", "backward") if backward else self.phase
        entry = Collective(operation, _purpose(operation), phase, whole[0].dtype, ranks)
        self.counts[entry] += 1
        self.sizes[entry] += sum(tensor.nbytes for tensor in whole)

    def rows(self) -> list[tuple[Collective, int, int]]:
        """Collective, calls and bytes, the largest first."""
        return sorted(
            ((entry, count, self.sizes[entry]) for entry, count in self.counts.items()),
            key=lambda row: -row[2],
        )


def sent_per_rank(operation: str, size: int, ranks: int) -> float:
    """Bytes that a rank sends in the ring algorithm, for whole tensors of ``size`` bytes."""
    rounds = 2 if operation == "all-reduce" else 1
    return rounds * size * (ranks - 1) / ranks


def _num_ranks(args: tuple) -> int:
    """Ranks of the process group among the arguments of an operator: an object, or its name."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and _is_group(argument):
            return dist.ProcessGroup.unbox(argument).size()
    return _resolve_process_group(args[-1]).size()


def _is_group(argument: torch.ScriptObject) -> bool:
    # Reductions are such objects too.
    return str(argument._type()).endswith(".ProcessGroup")


def _purpose(operation: str) -> str:
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if _DIFFERENTIABLE in name:
            # Its backward pass has no other frame: batch norms sum, KoLeo gathers.
            return "batch norm" if operation == "all-reduce" else "KoLeo"
        for part, purpose in _PURPOSES.items():
            if part in name:
                return purpose
        frame = frame.f_back
    return "other"
