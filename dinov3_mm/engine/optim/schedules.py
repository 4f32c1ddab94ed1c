"""Closed-form schedules: the value of a hyper-parameter at an iteration, with nothing to store.

A schedule is called with a zero-based iteration. Two families reproduce
DINOv3's training (arXiv 2508.10104, appendix C): ``cosine``, used by the ImageNet recipe, and
``warmup_cosine``, used by the 7B stages and the distilled models.
"""

import math
from dataclasses import dataclass


def _check_lengths(owner: str, total_iters: int, **parts: int) -> None:
    """Raise when a part is negative or the parts are longer than the schedule."""
    negative = {name: length for name, length in parts.items() if length < 0}
    if negative or total_iters < 1:
        raise ValueError(
            f"{owner}: lengths are iterations >= 0 and total_iters >= 1, "
            f"given total_iters={total_iters}, {parts}"
        )
    if sum(parts.values()) > total_iters:
        raise ValueError(
            f"{owner}: {' + '.join(f'{name}={length}' for name, length in parts.items())} is more "
            f"than total_iters={total_iters}; shorten them or train longer"
        )


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule:
    """The same value at every iteration."""

    value: float

    def __call__(self, it: int) -> float:
        """Return the constant."""
        return self.value


@dataclass(frozen=True, kw_only=True)
class LinearSchedule:
    """``start`` at iteration 0 to ``end`` at ``total_iters``, then ``end``."""

    start: float
    end: float
    total_iters: int

    def __post_init__(self):
        _check_lengths("linear schedule", self.total_iters)

    def __call__(self, it: int) -> float:
        """Return the value at iteration ``it``."""
        if it >= self.total_iters:
            return self.end
        return self.start + (self.end - self.start) * it / self.total_iters


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """Frozen at zero, linear warm-up that includes its end point, then half a cosine.

    Args:
        base: Value at the end of the warm-up.
        final: Value after ``total_iters``. The plain cosine approaches it, a truncated one
            (``trunc_extra > 0``) reaches it in the last iteration.
        total_iters: Length of the whole schedule.
        warmup_iters: Iterations from ``start`` to ``base``, both included.
        start: First value of the warm-up.
        freeze_iters: Iterations at zero before the warm-up.
        trunc_extra: The cosine is laid out over ``(1 + trunc_extra)`` times the remaining length,
            cut there, and stretched to end in ``final``.
    """

    base: float
    final: float
    total_iters: int
    warmup_iters: int = 0
    start: float = 0.0
    freeze_iters: int = 0
    trunc_extra: float = 0.0

    def __post_init__(self):
        _check_lengths(
            "cosine schedule",
            self.total_iters,
            freeze_iters=self.freeze_iters,
            warmup_iters=self.warmup_iters,
        )
        if self.trunc_extra < 0:
            raise ValueError(f"trunc_extra must not be negative, given {self.trunc_extra}")

    def __call__(self, it: int) -> float:
        """Return the value at iteration ``it``; ``final`` from ``total_iters`` on."""
        if it >= self.total_iters:
            return self.final
        if it < self.freeze_iters:
            return 0.0
        it -= self.freeze_iters
        if it < self.warmup_iters:
            return self.start + (self.base - self.start) * it / max(1, self.warmup_iters - 1)
        length = self.total_iters - self.freeze_iters - self.warmup_iters
        return self.final + (self.base - self.final) * self._decay(it - self.warmup_iters, length)

    def _decay(self, i: int, length: int) -> float:
        """Share of ``base - final`` that is left at step ``i`` of the cosine."""
        if self.trunc_extra == 0:
            return (1 + math.cos(math.pi * i / length)) / 2
        steps = int((1 + self.trunc_extra) * length)
        here, last = ((1 + math.cos(math.pi * k / max(1, steps - 1))) / 2 for k in (i, length - 1))
        return (here - last) / (1 - last) if last < 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class WarmupCosineSchedule:
    """Linear warm-up that excludes its end point, half a cosine through both ends, then constant.

    Args:
        start: First value of the warm-up.
        peak: Value at iteration ``warmup_iters``.
        end: Value in the last iteration of the cosine and afterwards.
        total_iters: Length of the whole schedule.
        warmup_iters: Iterations from ``start`` towards ``peak``.
        cosine_iters: Length of the cosine; all that remains when ``None``.
    """

    start: float
    peak: float
    end: float
    total_iters: int
    warmup_iters: int = 0
    cosine_iters: int | None = None

    def __post_init__(self):
        _check_lengths(
            "warmup_cosine schedule",
            self.total_iters,
            warmup_iters=self.warmup_iters,
            cosine_iters=self.cosine_iters or 0,
        )

    def __call__(self, it: int) -> float:
        """Return the value at iteration ``it``."""
        if it < self.warmup_iters:
            return self.start + (self.peak - self.start) * it / self.warmup_iters
        length = self.cosine_iters
        if length is None:
            length = self.total_iters - self.warmup_iters
        i = it - self.warmup_iters
        if i >= length:
            return self.end
        left = (1 + math.cos(math.pi * i / max(1, length - 1))) / 2
        return self.end + (self.peak - self.end) * left


Schedule = ConstantSchedule | LinearSchedule | CosineSchedule | WarmupCosineSchedule
