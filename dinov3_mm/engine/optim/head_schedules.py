"""Schedules of heads, as long as the run.

That of the official linear segmentation and depth heads is a warm-up, then one cosine. It is no
``OneCycleLR``: the cosine runs over the whole training, warm-up included, and the rate may jump
where the warm-up ends. Detectors fall in steps, here at shares of the run.

MMEngine's runner gives the length of the run as ``end`` to every schedule whose config leaves it
out, so those of the shipped configs do.
"""

import math
from collections.abc import Sequence
from typing import Any

from mmengine.optim import MultiStepLR
from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.momentum_scheduler import MomentumSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from mmengine.registry import PARAM_SCHEDULERS


class _OneCycle(_ParamScheduler):
    """Counting of steps that the rate and the momentum share."""

    def __init__(
        self,
        *args: Any,
        total_iters: int | None,
        warmup_iters: int | float,
        delay: int = 0,
        by_epoch: bool = False,
        end: int | None = None,
        **kwargs: Any,
    ) -> None:
        # MMEngine's runner gives ``end`` to every scheduler: the length of the run, in epochs where
        # a config does not say by_epoch=False.
        total_iters = end if total_iters is None else total_iters
        if total_iters is None:
            raise ValueError(
                "total_iters is missing; give it, or by_epoch=False and a run's length"
            )
        if isinstance(warmup_iters, float):
            warmup_iters = round(warmup_iters * total_iters)
        if not 0 <= warmup_iters < total_iters:
            raise ValueError(
                f"warmup_iters is {warmup_iters} and total_iters is {total_iters}; expected "
                "0 <= warmup_iters < total_iters, the iterations of the whole training: shorten "
                "the warm-up with the run, or give it as a share such as warmup_iters=0.1"
            )
        if delay < 0:
            raise ValueError(f"delay is {delay}; expected 0 or more iterations")
        if by_epoch:
            raise ValueError(f"{type(self).__name__} counts iterations; set by_epoch=False")
        self.total_iters = total_iters
        self.warmup_iters = warmup_iters
        self.delay = delay
        # Its end is total_iters.
        super().__init__(*args, by_epoch=by_epoch, **kwargs)

    @property
    def _t(self) -> int:
        """Completed steps of the schedule."""
        return min(max(self.last_step - self.delay, 0), self.total_iters - 1)


@PARAM_SCHEDULERS.register_module()
class WarmupOneCycleLR(LRSchedulerMixin, _OneCycle):
    """Learning rate: warm-up to the optimizer's ``lr``, then cosine annealing.

    With t completed steps of T, W of them warm-up, and the peak ``lr``:

    - t < W and ``warmup_ratio`` r > 0: ``lr (1 - (1 - t / W)(1 - r)) (1 - t / T)``;
    - t < W and r = 0: ``lr / F + t / W * lr (1 + cos(pi t / T)) / 2`` with F the
      ``final_div_factor``;
    - later: a cosine from ``lr`` to ``lr / div_factor / F`` at ``(t + 1) / T``.

    Args:
        optimizer: optimizer or its wrapper.
        total_iters: iterations of the training, T. By default those of the run; a config then says
            ``by_epoch=False``.
        warmup_iters: iterations of the warm-up, W; a float below 1 is a share of T.
        warmup_ratio: share of the peak at which the warm-up begins; 0 for the second formula.
        div_factor: see above.
        final_div_factor: see above; None ends at zero.
        delay: first iterations that do not count; the official segmentation trainer's is 1, so
            that its first two iterations share a rate.
        **kwargs: ``begin``, ``last_step``, ``verbose`` of MMEngine; ``end``, which its runner
            gives, stands in for ``total_iters``.

    Raises:
        ValueError: if the numbers of iterations or the factors make no schedule.
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        total_iters: int | None = None,
        warmup_iters: int | float,
        warmup_ratio: float = 0.0,
        div_factor: float = 25.0,
        final_div_factor: float | None = None,
        delay: int = 0,
        **kwargs: Any,
    ) -> None:
        if not 0 <= warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is {warmup_ratio}; expected 0 to 1")
        if div_factor <= 0 or (final_div_factor is not None and final_div_factor <= 0):
            raise ValueError(
                f"div_factor is {div_factor} and final_div_factor is {final_div_factor}; "
                "expected positive numbers, or final_div_factor=None to end at zero"
            )
        self.warmup_ratio = warmup_ratio
        self.div_factor = div_factor
        self.final_div_factor = final_div_factor
        super().__init__(
            optimizer, total_iters=total_iters, warmup_iters=warmup_iters, delay=delay, **kwargs
        )

    def _get_value(self) -> list[float]:
        return [peak * self._share() for peak in self.base_values]

    def _share(self) -> float:
        """The rate as a share of its peak."""
        t, total = self._t, self.total_iters
        end = 1 / self.final_div_factor if self.final_div_factor else 0.0
        if t >= self.warmup_iters:
            return _cosine(1.0, end / self.div_factor, (t + 1) / total)
        progress = t / self.warmup_iters
        if self.warmup_ratio > 0:
            return (1 - (1 - progress) * (1 - self.warmup_ratio)) * (1 - t / total)
        return end + progress * _cosine(1.0, 0.0, t / total)


@PARAM_SCHEDULERS.register_module()
class WarmupOneCycleMomentum(MomentumSchedulerMixin, _OneCycle):
    """Momentum, or Adam's first beta, beside :class:`WarmupOneCycleLR`.

    A constant during the warm-up, then a cosine from ``base_momentum`` to ``max_momentum``.

    Args:
        optimizer: optimizer or its wrapper.
        total_iters, warmup_iters, delay, **kwargs: see :class:`WarmupOneCycleLR`.
        base_momentum: momentum after the warm-up.
        max_momentum: momentum at the end.
        warmup_momentum: momentum during the warm-up; the official depth trainer's is 0.

    Raises:
        ValueError: if the numbers of iterations make no schedule, or a momentum is not in [0, 1).
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        total_iters: int | None = None,
        warmup_iters: int | float,
        base_momentum: float = 0.85,
        max_momentum: float = 0.95,
        warmup_momentum: float = 0.0,
        delay: int = 0,
        **kwargs: Any,
    ) -> None:
        for value in (base_momentum, max_momentum, warmup_momentum):
            if not 0 <= value < 1:
                raise ValueError(f"a momentum of {value}; expected 0 or more and less than 1")
        self.base_momentum = base_momentum
        self.max_momentum = max_momentum
        self.warmup_momentum = warmup_momentum
        super().__init__(
            optimizer, total_iters=total_iters, warmup_iters=warmup_iters, delay=delay, **kwargs
        )

    def _get_value(self) -> list[float]:
        value = self.warmup_momentum
        if self._t >= self.warmup_iters:
            progress = (self._t - self.warmup_iters) / (self.total_iters - self.warmup_iters)
            value = _cosine(self.base_momentum, self.max_momentum, progress)
        return [value] * len(self.base_values)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


@PARAM_SCHEDULERS.register_module()
class MultiStepShareLR(MultiStepLR):
    """Learning rate that falls at shares of the run: ``MultiStepLR`` that knows its length.

    Args:
        optimizer: optimizer or its wrapper.
        shares: where the rate falls, from 0 to 1. [9 / 12, 11 / 12] of 24 epochs are 18 and 22.
        end: length of the run; MMEngine's runner gives it.
        **kwargs: see MMEngine's ``MultiStepLR``; ``milestones`` come from ``shares``.

    Raises:
        ValueError: for shares outside of 0 to 1.
    """

    def __init__(self, optimizer: Any, *, shares: Sequence[float], end: int, **kwargs: Any) -> None:
        if not all(0 < share <= 1 for share in shares):
            raise ValueError(f"shares are {list(shares)}; expected numbers above 0 and up to 1")
        # Down, so that the lowest rate has an epoch in a short run too.
        milestones = [max(math.floor(share * end + 1e-9), 1) for share in shares]
        super().__init__(optimizer, milestones=milestones, end=end, **kwargs)
