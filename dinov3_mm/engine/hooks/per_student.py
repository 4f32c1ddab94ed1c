"""The hooks of a pretraining run, for every student of a multi-distillation."""

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from dinov3_mm.engine.strategies.students import StudentRunner
from dinov3_mm.models.pretraining.multi_distillation import PREFIX, check_names

STATE_KEY = "students"


@HOOKS.register_module()
class PerStudentHook(Hook):
    """Runs one hook for each student: with its model, optimizer, metrics and work folder.

    Whatever the hook reduces over processes it reduces over the ranks of its student.

    Args:
        hook: Config of the hook, such as ``dict(type='OptimScheduleHook', ...)``.
        students: What is different for a student, by name: merged into ``hook``.

    Raises:
        ValueError: In ``before_train``: settings of an unknown student.
    """

    def __init__(
        self, hook: Mapping[str, Any], students: Mapping[str, Mapping[str, Any]] | None = None
    ):
        self._cfg = hook
        self._changes = students or {}
        self.hooks: dict[str, Hook] = {}
        self._views: dict[str, StudentRunner] = {}
        for changes in (None, *self._changes.values()):
            self.priority = self._build(changes).priority

    def _build(self, changes: Mapping[str, Any] | None) -> Hook:
        cfg = Config(dict(hook=self._cfg))
        cfg.merge_from_dict(dict(hook=changes or {}))
        return HOOKS.build(cfg.hook)

    def _prepare(self, runner) -> None:
        if self._views:
            return
        model = runner.model
        if not hasattr(model, "students"):
            raise ValueError(
                f"PerStudentHook needs a MultiDistillation, not {type(model).__name__}; give "
                f"{self._cfg['type']} itself to custom_hooks"
            )
        check_names(self._changes, model.student_names, f"PerStudentHook of {self._cfg['type']}")
        for name in model.students:
            self.hooks[name] = self._build(self._changes.get(name))
            self._views[name] = StudentRunner(runner, name)

    def _call(self, stage: str, runner, **kwargs) -> None:
        self._prepare(runner)
        for name, hook in self.hooks.items():
            view = self._views[name]
            view.hooks = [
                other.hooks[name]
                for other in runner.hooks
                if isinstance(other, PerStudentHook)
                if other.hooks
            ]
            with view.as_world():
                getattr(hook, stage)(view, **kwargs)

    def before_run(self, runner) -> None:
        self._call("before_run", runner)

    def after_run(self, runner) -> None:
        self._call("after_run", runner)

    def before_train(self, runner) -> None:
        for other in runner.hooks:
            if isinstance(other, PerStudentHook):
                other._prepare(runner)
        self._call("before_train", runner)

    def before_train_epoch(self, runner) -> None:
        self._call("before_train_epoch", runner)

    def after_train_epoch(self, runner) -> None:
        self._call("after_train_epoch", runner)

    def after_train(self, runner) -> None:
        self._call("after_train", runner)

    def before_train_iter(self, runner, batch_idx: int, data_batch: dict | None = None) -> None:
        self._call("before_train_iter", runner, batch_idx=batch_idx, data_batch=data_batch)

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        """Give each hook its student's metrics, and take over what it adds."""
        for name, hook in self.hooks.items():
            prefix, view = f"{PREFIX}{name}/", self._views[name]
            own = {
                key.removeprefix(prefix): value
                for key, value in outputs.items()
                if key.startswith(prefix)
            }
            with view.as_world():
                hook.after_train_iter(view, batch_idx, data_batch, own)
            outputs.update({f"{prefix}{key}": value for key, value in own.items()})

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Keep what hooks store of a student with the student."""
        for name, hook in self.hooks.items():
            own = checkpoint.setdefault(STATE_KEY, {}).setdefault(name, {})
            with self._views[name].as_world():
                hook.before_save_checkpoint(self._views[name], own)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Give it back."""
        self._prepare(runner)
        for name, hook in self.hooks.items():
            with self._views[name].as_world():
                hook.after_load_checkpoint(self._views[name], checkpoint[STATE_KEY][name])
