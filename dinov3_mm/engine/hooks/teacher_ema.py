"""The EMA teacher: its temperature before each step, its update after it."""

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from dinov3_mm.engine.optim import build_schedule


@HOOKS.register_module()
class TeacherEMAHook(Hook):
    """Gives the model its step values and moves the teacher towards the student.

    After iteration ``it``: ``teacher = m * teacher + (1 - m) * student`` with ``m = momentum(it)``.
    After a skipped step the teacher stays as it is; that is decided on the device.

    Args:
        momentum: Schedule of ``m``, see :func:`dinov3_mm.engine.optim.build_schedule`.
        teacher_temp: Schedule of the temperature of the teacher's targets.
        dino_local_weight: Schedule of the weight of the local DINO term; ``None`` leaves it at 1.
    """

    priority = "VERY_HIGH"

    def __init__(
        self,
        momentum: dict | float,
        teacher_temp: dict | float,
        dino_local_weight: dict | float | None = None,
    ):
        self.momentum_cfg = momentum
        self.step_cfgs = {"teacher_temp": teacher_temp}
        if dino_local_weight is not None:
            self.step_cfgs["dino_local_weight"] = dino_local_weight

    def before_train(self, runner) -> None:
        """Build the schedules for the run's length."""
        total = runner.max_iters
        self.momentum = build_schedule(self.momentum_cfg, total)
        self.step_schedules = {
            name: build_schedule(cfg, total) for name, cfg in self.step_cfgs.items()
        }
        self.model = runner.model.module if is_model_wrapper(runner.model) else runner.model

    def before_train_iter(self, runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Set the model's step values."""
        it = runner.iter
        self.model.set_step(**{name: value(it) for name, value in self.step_schedules.items()})

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        """Update the teacher and report momentum and temperature."""
        it = runner.iter
        momentum = self.momentum(it)
        skipped = runner.optim_wrapper.step_skipped
        if skipped.device.type != "cpu":
            self.model.update_teacher(torch.where(skipped, 1.0, momentum))
        elif not skipped:
            self.model.update_teacher(momentum)
        outputs.update(momentum=momentum, teacher_temp=self.step_schedules["teacher_temp"](it))
