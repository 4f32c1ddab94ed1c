"""What changes from step to step: learning rate, weight decay, the EMA teacher."""

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from dinov3_mm.engine.optim import BACKBONE, build_schedule, lr_scale, scale_lr_schedule
from dinov3_mm.models.wrapping import unwrapped


@HOOKS.register_module()
class OptimScheduleHook(Hook):
    """Writes the learning rate and weight decay of each iteration into the optimizer.

    A group gets ``lr(it) * lr_multiplier`` and ``weight_decay(it) * wd_multiplier``. In the first
    ``freeze_last_layer_iters`` iterations the last layers of the heads get a learning rate of zero.

    A trained backbone under random heads would first unlearn: their gradients are noise. In the
    first ``backbone_freeze_iters`` iterations it therefore stays as it is to the bit, without
    update, weight decay or optimizer moments, while the heads learn to read it. Then its learning
    rate rises linearly over ``backbone_warmup_iters`` iterations to that of the schedule.

    Args:
        lr: Schedule of the learning rate, see :func:`dinov3_mm.engine.optim.build_schedule`.
        weight_decay: Schedule of the weight decay.
        freeze_last_layer_iters: Iterations in which the prototypes stay as they are.
        scaling_rule: How ``lr`` follows the global batch size: ``'sqrt_wrt_1024'``,
            ``'linear_wrt_256'`` or ``None``. The derivation is logged.
        backbone_freeze_iters: Iterations in which the backbone stays as it is.
        backbone_warmup_iters: Iterations from the thaw to the full learning rate.

    Raises:
        ValueError: A bad schedule, an unknown rule, a negative number of iterations, or a freeze as
            long as the run.
    """

    priority = "VERY_HIGH"

    def __init__(
        self,
        lr: dict | float,
        weight_decay: dict | float,
        freeze_last_layer_iters: int = 0,
        scaling_rule: str | None = None,
        backbone_freeze_iters: int = 0,
        backbone_warmup_iters: int = 0,
    ):
        counts = dict(
            freeze_last_layer_iters=freeze_last_layer_iters,
            backbone_freeze_iters=backbone_freeze_iters,
            backbone_warmup_iters=backbone_warmup_iters,
        )
        for name, value in counts.items():
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: integer >= 0 expected, given {value!r}")
        lr_scale(scaling_rule, 1)
        self.lr_cfg = lr
        self.weight_decay_cfg = weight_decay
        self.freeze_last_layer_iters = freeze_last_layer_iters
        self.scaling_rule = scaling_rule
        self.backbone_freeze_iters = backbone_freeze_iters
        self.backbone_warmup_iters = backbone_warmup_iters

    @property
    def head_start_iters(self) -> int:
        """Iterations before the backbone learns at the full rate."""
        return self.backbone_freeze_iters + self.backbone_warmup_iters

    def before_train(self, runner) -> None:
        """Build the schedules for the run's length and batch size."""
        batch = runner.train_loop.layout.global_batch_size
        lr_cfg = scale_lr_schedule(self.lr_cfg, self.scaling_rule, batch)
        self.lr = build_schedule(lr_cfg, runner.max_iters)
        self.weight_decay = build_schedule(self.weight_decay_cfg, runner.max_iters)
        if self.scaling_rule is not None:
            runner.logger.info(
                f"learning rate: {self.scaling_rule} with a global batch of {batch} is a factor "
                f"{lr_scale(self.scaling_rule, batch):.4g}: {self.lr}"
            )
        if self.backbone_freeze_iters >= runner.max_iters:
            raise ValueError(
                f"backbone_freeze_iters={self.backbone_freeze_iters} leaves nothing of the run's "
                f"{runner.max_iters} iterations for the backbone; shorten it or train longer"
            )
        if runner.iter < self.backbone_freeze_iters:
            runner.logger.info(
                f"the backbone stays frozen until iteration {self.backbone_freeze_iters}, while "
                "the heads learn to read it"
            )

    def last_layer_lr(self, it: int) -> float:
        """Learning rate of the heads' last layers at iteration ``it``."""
        return 0.0 if it < self.freeze_last_layer_iters else self.lr(it)

    def backbone_lr(self, it: int) -> float:
        """Learning rate of the backbone at iteration ``it``, before the groups' multipliers."""
        thawed = it - self.backbone_freeze_iters
        if thawed < 0:
            return 0.0
        return self.lr(it) * min(1.0, (thawed + 1) / (self.backbone_warmup_iters + 1))

    def before_train_iter(self, runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Set the groups."""
        it = runner.iter
        is_frozen = it < self.backbone_freeze_iters
        runner.optim_wrapper.frozen = frozenset((BACKBONE,)) if is_frozen else frozenset()
        if it == self.backbone_freeze_iters > 0:
            runner.logger.info(
                f"iteration {it}: the backbone thaws; its learning rate rises to the schedule's "
                f"over {self.backbone_warmup_iters} iterations"
            )
        weight_decay = self.weight_decay(it)
        for group in runner.optim_wrapper.param_groups:
            group["lr"] = self._group_lr(group, it) * group.get("lr_multiplier", 1.0)
            group["weight_decay"] = weight_decay * group.get("wd_multiplier", 1.0)

    def _group_lr(self, group: dict, it: int) -> float:
        if group.get("is_last_layer"):
            return self.last_layer_lr(it)
        return self.backbone_lr(it) if group.get("submodule") == BACKBONE else self.lr(it)

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        """Report the schedules' values and what the optimizer did in the step."""
        it = runner.iter
        outputs.update(
            lr=self.lr(it),
            last_layer_lr=self.last_layer_lr(it),
            weight_decay=self.weight_decay(it),
            **runner.optim_wrapper.step_metrics,
        )
        if self.head_start_iters:
            outputs["backbone_lr"] = self.backbone_lr(it)


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
        self.model = unwrapped(runner.model)

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
