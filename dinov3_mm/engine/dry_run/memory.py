"""Which tensors are alive at which moment of a step, and of what kind they are."""

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS = "activations"
BACKWARD = "working memory of the backward pass"
OTHER = "working memory outside of the passes"
GATHERED = "gathered parameters and gradients in flight"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer state"
BATCH = "batch"

_COMMUNICATION = ("c10d", "_c10d_functional", "fsdp")


@dataclass(eq=False)
class Block:
    """One storage.

    Attributes:
        kind: what it holds; may be learnt later.
        size: bytes that are allocated.
    """

    kind: str
    size: int = 0


@dataclass(frozen=True)
class Peak:
    """The fullest moment.

    Attributes:
        total: bytes.
        by_kind: bytes of each kind.
        phase: what was going on.
    """

    total: int
    by_kind: dict[str, int]
    phase: str


@dataclass
class MemoryLedger(TorchDispatchMode):
    """Books every storage that an operator returns, until it is freed.

    Works on fake tensors as on real ones. What an operator allocates and frees within itself is not
    seen, nor what an allocator rounds up, caches or fragments.

    Attributes:
        device: only tensors of this device type are booked; None books all.
    """

    events: list[tuple[Block, int, str]] = field(default_factory=list)
    phase: str = ""
    device: str | None = None

    def __post_init__(self) -> None:
        super().__init__()
        self._blocks: dict[int, tuple[Block, weakref.ref]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return func(*args)  # asked more often than all else
        out = func(*args, **(kwargs or {}))
        if not self.phase.startswith("forward") and _is_shape_inference():
            return out
        for tensor in tree_leaves(out):
            if self._counts(tensor):
                self._book(_local(tensor).untyped_storage(), self._kind_now())
        if func.namespace in _COMMUNICATION:
            self.tell(GATHERED, tree_leaves((args, out)), over=(ACTIVATIONS, BACKWARD, OTHER))
        return out

    def tell(self, kind: str, tensors: Iterable, over: tuple[str, ...] | None = None) -> None:
        """Say what ``tensors`` hold; with ``over`` only of those that were of these kinds."""
        for tensor in tensors:
            if self._counts(tensor):
                block = self._book(_local(tensor).untyped_storage(), kind)
                if over is None or block.kind in over:
                    block.kind = kind

    @contextmanager
    def watching_resizes(self) -> Iterator[None]:
        """Context that also books ``storage.resize_``, with which FSDP2 frees parameters."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> None:
            block = self._book(storage, GATHERED)
            original(storage, size)
            self._change(block, size - block.size)
            block.kind = GATHERED if block.kind in (ACTIVATIONS, BACKWARD, OTHER) else block.kind

        torch.UntypedStorage.resize_ = resize
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original

    @property
    def current(self) -> int:
        """Bytes that are allocated."""
        return sum(block.size for block, _ in self._blocks.values())

    def by_kind(self) -> dict[str, int]:
        """Bytes that are allocated, by kind."""
        sizes: Counter[str] = Counter()
        for block, _ in self._blocks.values():
            sizes[block.kind] += block.size
        return dict(sizes)

    def peak(self, since: int = 0) -> Peak:
        """The fullest moment after the event number ``since``."""
        total = best = 0
        best_index, phase = 0, ""
        for index, (_, change, when) in enumerate(self.events):
            total += change
            if index >= since and total > best:
                best, best_index, phase = total, index, when
        sizes: Counter[str] = Counter()
        for block, change, _ in self.events[: best_index + 1]:
            sizes[block.kind] += change
        return Peak(best, {kind: size for kind, size in sizes.items() if size}, phase)

    def _counts(self, value: object) -> bool:
        if not isinstance(value, Tensor):
            return False
        return self.device in (None, _local(value).device.type)

    def _kind_now(self) -> str:
        if torch._C._current_graph_task_id() != -1:
            return BACKWARD
        return ACTIVATIONS if self.phase.startswith("forward") else OTHER

    def _book(self, storage: torch.UntypedStorage, kind: str) -> Block:
        key = storage._cdata
        known = self._blocks.get(key)
        if known is not None:
            return known[0]
        block = Block(kind)
        self._blocks[key] = block, weakref.ref(storage, lambda _: self._free(key))
        self._change(block, storage.nbytes())
        return block

    def _free(self, key: int) -> None:
        block, _ = self._blocks.pop(key)
        self._change(block, -block.size)

    def _change(self, block: Block, change: int) -> None:
        block.size += change
        if change:
            phase = self.phase
            if torch._C._current_graph_task_id() != -1:
                phase = phase.replace("forward", "backward")
            self.events.append((block, change, phase))


def _is_shape_inference() -> bool:
    """Whether a DTensor is finding out the shape of a result, on fake tensors of the whole size."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.endswith("_sharding_prop.py"):
            return True
        frame = frame.f_back
    return False


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
