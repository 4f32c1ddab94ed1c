"""What the schedules of a config say, and their values for one step."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS
from torch import nn

from dinov3_mm.datasets import BatchLayout
from dinov3_mm.engine.hooks import (
    DistillationHook,
    GramAnchorHook,
    OptimScheduleHook,
    PerStudentHook,
    TeacherEMAHook,
)
from dinov3_mm.engine.optim import Schedule, build_schedule
from dinov3_mm.errors import ConfigError
from dinov3_mm.models.pretraining.multi_distillation import check_names

_STEP_HOOKS = (OptimScheduleHook, TeacherEMAHook, GramAnchorHook, DistillationHook)


@dataclass
class Schedules:
    """The schedules of a run.

    Attributes:
        max_iters: iterations of the run.
        values: value by iteration, by name.
        step_values: names that the model's ``set_step`` takes.
        moments: iterations at which something begins or ends.
        hooks: the hooks that take part in a step.
    """

    max_iters: int
    values: dict[str, Callable[[int], float]] = field(default_factory=dict)
    step_values: tuple[str, ...] = ()
    moments: dict[int, str] = field(default_factory=dict)
    hooks: dict[type, Any] = field(default_factory=dict)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: the values at the beginning, ends of warm-ups, middle and end."""
        last = self.max_iters - 1
        moments = {0: "first", self.max_iters // 2: "middle", last: "last"}
        moments.update((it, words) for it, words in self.moments.items() if 0 < it < last)
        rows = [
            [f"{it:,}", moments[it], *(f"{value(it):.4g}" for value in self.values.values())]
            for it in sorted(moments)
        ]
        return ["iteration", "", *self.values], rows


def read_schedules(
    cfg: Config, model: nn.Module, layout: BatchLayout, student: str = ""
) -> Schedules:
    """Build the schedules of the config's hooks, with the hooks' own checks.

    Args:
        cfg: completed config.
        model: the algorithm.
        layout: of the global batch.
        student: name of the one that is meant, if there are several.

    Raises:
        ConfigError: an argument that a hook or schedule refuses, or a hook that is missing.
    """
    max_iters = cfg.train_cfg["max_iters"]
    found = Schedules(max_iters)
    runner = SimpleNamespace(
        max_iters=max_iters,
        iter=0,
        model=model.students[student] if student else model,
        train_loop=SimpleNamespace(layout=layout),
        logger=MMLogger.get_current_instance(),
    )
    for index, hook_cfg in _hook_configs(cfg, model, student):
        kind = _hook_type(hook_cfg)
        if kind not in _STEP_HOOKS:
            continue
        try:
            hook = HOOKS.build(copy.deepcopy(dict(hook_cfg)))
            found.hooks[kind] = hook
            if kind in _READERS:
                _READERS[kind](found, hook, runner)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"custom_hooks.{index}: {error}") from error
    _check_hooks(found, model)
    return found


def _hook_configs(cfg: Config, model: nn.Module, student: str) -> Iterator[tuple[int, Any]]:
    """Position and config of every hook, of several students those of one."""
    for index, hook_cfg in enumerate(cfg.get("custom_hooks") or []):
        if _hook_type(hook_cfg) is PerStudentHook:
            changes = hook_cfg.get("students") or {}
            try:
                check_names(changes, model.student_names, "students")
            except ValueError as error:
                raise ConfigError(f"custom_hooks.{index}: {error}") from error
            merged = Config(dict(hook=copy.deepcopy(hook_cfg["hook"])))
            merged.merge_from_dict(dict(hook=copy.deepcopy(changes.get(student) or {})))
            hook_cfg = merged.hook
        yield index, hook_cfg


def _hook_type(hook_cfg: Any) -> Any:
    kind = hook_cfg["type"]
    return HOOKS.get(kind) if isinstance(kind, str) else kind


def _check_hooks(found: Schedules, model: nn.Module) -> None:
    """Refuse a model whose parts have no hook that gives them values."""
    needed = {TeacherEMAHook: "momentum=..., teacher_temp=..."}
    if hasattr(model, "gram_teacher"):
        needed[GramAnchorHook] = "checkpoint=FILE"
    if getattr(model, "distillation_teacher", None) is not None:
        needed[DistillationHook] = "checkpoint=FILE"
    for kind, arguments in needed.items():
        if kind not in found.hooks:
            raise ConfigError(
                f"custom_hooks: training needs dict(type={kind.__name__!r}, {arguments})"
            )


def _read_optimizer(found: Schedules, hook: OptimScheduleHook, runner: Any) -> None:
    hook.before_train(runner)
    found.values.update(
        lr=hook.lr, last_layer_lr=hook.last_layer_lr, weight_decay=hook.weight_decay
    )
    if hook.head_start_iters:
        found.values["backbone_lr"] = hook.backbone_lr
    _add_ends(found, lr=hook.lr, weight_decay=hook.weight_decay)
    for moment, words in (
        (hook.freeze_last_layer_iters, "last layers thaw"),
        (hook.backbone_freeze_iters, "backbone thaws"),
        (hook.head_start_iters, "backbone at full rate"),
    ):
        _add_moment(found, moment, words)


def _read_teacher(found: Schedules, hook: TeacherEMAHook, runner: Any) -> None:
    hook.before_train(runner)
    found.values.update(momentum=hook.momentum, **hook.step_schedules)
    found.step_values += tuple(hook.step_schedules)
    _add_ends(found, momentum=hook.momentum, **hook.step_schedules)


def _read_gram(found: Schedules, hook: GramAnchorHook, runner: Any) -> None:
    gram = getattr(runner.model, "gram", None)
    if gram is None:
        raise ValueError("GramAnchorHook needs a model with gram=dict(...)")
    weight = gram["weight"] if hook.weight_cfg is None else hook.weight_cfg
    found.values["gram_weight"] = build_schedule(weight, runner.max_iters)
    found.step_values += ("gram_weight",)
    _add_ends(found, gram_weight=found.values["gram_weight"])


_READERS = {
    OptimScheduleHook: _read_optimizer,
    TeacherEMAHook: _read_teacher,
    GramAnchorHook: _read_gram,
}


def _add_ends(found: Schedules, **schedules: Schedule) -> None:
    """Note where warm-ups, freezes and ramps end."""
    for name, schedule in schedules.items():
        frozen = getattr(schedule, "freeze_iters", 0)
        _add_moment(found, frozen, f"{name} thaws")
        warm = frozen + getattr(schedule, "warmup_iters", 0)
        _add_moment(found, warm, f"{name} warmed up")
        total = getattr(schedule, "total_iters", found.max_iters)
        if total < found.max_iters:
            _add_moment(found, total, f"{name} at its end")


def _add_moment(found: Schedules, iteration: int, words: str) -> None:
    if iteration:
        known = found.moments.get(iteration)
        found.moments[iteration] = words if known in (None, words) else f"{known}, {words}"
