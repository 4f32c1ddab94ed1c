"""Closed-form schedules: the value of a hyper-parameter at an iteration, with nothing to store.

A schedule is called with a zero-based iteration. Two families reproduce
DINOv3's training (arXiv 2508.10104, appendix C): ``cosine``, used by the ImageNet recipe, and
``warmup_cosine``, used by the 7B stages and the distilled models.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from numbers import Real

from mmengine.registry import PARAM_SCHEDULERS

from dinov3_mm.errors import hint


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


# --- Schedules from config dicts, and the rules that scale a learning rate with the batch size ---


SCHEDULES = {
    "constant": ConstantSchedule,
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "warmup_cosine": WarmupCosineSchedule,
}

# The config check looks every ``type`` up in MMEngine's registries.
for _name, _schedule in SCHEDULES.items():
    PARAM_SCHEDULERS.register_module(name=_name, module=_schedule)

# The values of a schedule that a learning-rate rule multiplies. The rest (the cosine's final value,
# the first value of a warm-up) are absolute in DINOv3's recipes.
SCALED_FIELDS = {
    "constant": ("value",),
    "linear": ("end",),
    "cosine": ("base",),
    "warmup_cosine": ("peak", "end"),
}

SCALING_RULES = {
    "linear_wrt_256": lambda batch: batch / 256,
    "sqrt_wrt_1024": lambda batch: 4 * math.sqrt(batch / 1024),
}


def _schedule_type(cfg: Mapping) -> str:
    kind = cfg.get("type")
    if kind not in SCHEDULES:
        raise ValueError(f"unknown schedule type {kind!r}: {hint(str(kind), SCHEDULES)}")
    return kind


def build_schedule(cfg: Schedule | Mapping | float, total_iters: int) -> Schedule:
    """Build a schedule.

    Args:
        cfg: A number (constant), ``dict(type=..., ...)`` with a type of ``SCHEDULES`` and the
            arguments of its class, or a schedule, which is returned as it is.
        total_iters: ``total_iters`` of the schedule where ``cfg`` does not give one: the length
            of the run.

    Returns:
        A callable from iteration to value.

    Raises:
        ValueError: An unknown type, or an argument that is unknown, missing or not a number.
    """
    if isinstance(cfg, Schedule):
        return cfg
    if isinstance(cfg, Real) and not isinstance(cfg, bool):
        return ConstantSchedule(value=float(cfg))
    if not isinstance(cfg, Mapping):
        raise TypeError(
            f"a schedule is a number or a dict with a type of {sorted(SCHEDULES)}, given {cfg!r}"
        )
    kind = _schedule_type(cfg)
    arguments = {name: value for name, value in cfg.items() if name != "type"}
    known = {field.name: field for field in fields(SCHEDULES[kind])}
    for name in arguments:
        if name not in known:
            raise ValueError(f"schedule {kind!r} takes no argument {name!r}: {hint(name, known)}")
    if "total_iters" in known and arguments.get("total_iters") is None:
        arguments["total_iters"] = total_iters
    missing = [
        name for name, field in known.items() if field.default is MISSING and name not in arguments
    ]
    if missing:
        raise ValueError(f"schedule {kind!r} needs {missing}, given {dict(cfg)}")
    for name, value in arguments.items():
        optional = known[name].default is None and value is None
        if not optional and (not isinstance(value, Real) or isinstance(value, bool)):
            raise ValueError(f"schedule {kind!r}: {name} must be a number, given {value!r}")
    return SCHEDULES[kind](**arguments)


def lr_scale(rule: str | None, global_batch_size: int) -> float:
    """Return the factor of a batch-size rule for learning rates; 1 without a rule.

    ``linear_wrt_256`` is ``batch / 256``; ``sqrt_wrt_1024`` is ``4 * sqrt(batch / 1024)``.

    Raises:
        ValueError: An unknown rule.
    """
    if rule is None:
        return 1.0
    if rule not in SCALING_RULES:
        raise ValueError(f"unknown scaling_rule {rule!r}: {hint(str(rule), SCALING_RULES)}")
    return SCALING_RULES[rule](global_batch_size)


def scale_lr_schedule(
    cfg: Mapping | float, rule: str | None, global_batch_size: int
) -> Mapping | float:
    """Apply a batch-size rule to a learning-rate config.

    The rule multiplies ``base`` of a cosine, ``peak`` and ``end`` of a ``warmup_cosine``, ``end``
    of a linear schedule and a constant; ``final`` of a cosine and ``start`` values stay as given.

    Returns:
        A config with the scaled values, for :func:`build_schedule`.
    """
    scale = lr_scale(rule, global_batch_size)
    if not isinstance(cfg, Mapping):
        return cfg * scale
    names = SCALED_FIELDS[_schedule_type(cfg)]
    return {name: value * scale if name in names else value for name, value in cfg.items()}
