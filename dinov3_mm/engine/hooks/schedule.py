"""Learning rate and weight decay of every parameter group, from schedules."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from dinov3_mm.engine.optim import build_schedule, lr_scale, scale_lr_schedule


@HOOKS.register_module()
class OptimScheduleHook(Hook):
    """Writes the learning rate and weight decay of each iteration into the optimizer.

    A group gets ``lr(it) * lr_multiplier`` and ``weight_decay(it) * wd_multiplier``. In the first
    ``freeze_last_layer_iters`` iterations the last layers of the heads get a learning rate of zero.

    Args:
        lr: Schedule of the learning rate, see :func:`dinov3_mm.engine.optim.build_schedule`.
        weight_decay: Schedule of the weight decay.
        freeze_last_layer_iters: Iterations in which the prototypes stay as they are.
        scaling_rule: How ``lr`` follows the global batch size: ``'sqrt_wrt_1024'``,
            ``'linear_wrt_256'`` or ``None``. The derivation is logged.

    Raises:
        ValueError: A bad schedule, an unknown rule or a negative freeze.
    """

    priority = "VERY_HIGH"

    def __init__(
        self,
        lr: dict | float,
        weight_decay: dict | float,
        freeze_last_layer_iters: int = 0,
        scaling_rule: str | None = None,
    ):
        if not isinstance(freeze_last_layer_iters, int) or freeze_last_layer_iters < 0:
            raise ValueError(
                f"freeze_last_layer_iters: integer >= 0 expected, given {freeze_last_layer_iters!r}"
            )
        lr_scale(scaling_rule, 1)
        self.lr_cfg = lr
        self.weight_decay_cfg = weight_decay
        self.freeze_last_layer_iters = freeze_last_layer_iters
        self.scaling_rule = scaling_rule

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

    def last_layer_lr(self, it: int) -> float:
        """Learning rate of the heads' last layers at iteration ``it``."""
        return 0.0 if it < self.freeze_last_layer_iters else self.lr(it)

    def before_train_iter(self, runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Set the groups."""
        it = runner.iter
        lr, last_layer_lr, weight_decay = self.lr(it), self.last_layer_lr(it), self.weight_decay(it)
        for group in runner.optim_wrapper.param_groups:
            group_lr = last_layer_lr if group.get("is_last_layer") else lr
            group["lr"] = group_lr * group.get("lr_multiplier", 1.0)
            group["weight_decay"] = weight_decay * group.get("wd_multiplier", 1.0)

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
