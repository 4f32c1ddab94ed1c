"""Schedules from config dicts, and the rules that scale a learning rate with the batch size."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from numbers import Real

from mmengine.registry import PARAM_SCHEDULERS

from dinov3_mm.suggest import hint

from .schedules import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    Schedule,
    WarmupCosineSchedule,
)

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
