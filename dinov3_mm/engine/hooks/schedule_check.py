"""Schedules of a downstream run that do not end where it does are named before it starts."""

from collections.abc import Iterator

from mmengine.hooks import Hook
from mmengine.optim.scheduler.param_scheduler import (
    CosineAnnealingParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    OneCycleParamScheduler,
    PolyParamScheduler,
)
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop

from dinov3_mm.engine.optim.head_schedules import WarmupOneCycleLR

_ANNEALING = (
    CosineAnnealingParamScheduler,
    MultiStepParamScheduler,
    OneCycleParamScheduler,
    PolyParamScheduler,
    WarmupOneCycleLR,
)
# Shares of the run: rounding of epochs to iterations; half, after which a warm-up leaves no
# training, and before which a last step leaves little of it at the full rate.
_ROUNDING, _HALF = 0.02, 0.5


@HOOKS.register_module()
class ScheduleCheckHook(Hook):
    """Warns of a learning rate that ends its way before or after the run.

    ``train_cfg.max_epochs=40`` beside a cosine of 20 epochs trains the last checkpoint at the full
    rate. :func:`~dinov3_mm.engine.build_runner` adds the hook to downstream runs.
    """

    def before_train(self, runner) -> None:
        """Compare the schedules with the length of the run."""
        is_by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        length = len(runner.train_dataloader) if is_by_epoch else 1
        schedulers = runner.param_schedulers
        if isinstance(schedulers, dict):  # of several optimizers
            schedulers = [each for group in schedulers.values() for each in group]
        for line in compare_lengths(schedulers or [], length, runner.max_iters):
            runner.logger.warning(line)


def compare_lengths(schedulers: list, epoch_length: int, total: int) -> Iterator[str]:
    """Lines on schedules of the learning rate that do not fit a run.

    Args:
        schedulers: of MMEngine, as its runner builds them.
        epoch_length: iterations of an epoch.
        total: iterations of the run.
    """
    rates = [each for each in schedulers if each.param_name == "lr"]
    for each in rates:
        end = each.end * (epoch_length if each.by_epoch else 1)
        is_warmup = isinstance(each, LinearParamScheduler) and each.start_factor < each.end_factor
        if is_warmup and end > _HALF * total:
            yield (
                f"the warm-up takes {end} iterations, the run has {total}: set the end of "
                f"{type(each).__name__} in param_scheduler to a tenth of them, or train longer"
            )
    annealing = [each for each in rates if isinstance(each, _ANNEALING)]
    if not annealing:
        return
    last = max(annealing, key=lambda each: _finish(each, epoch_length))
    finish, name = _finish(last, epoch_length), type(last).__name__
    advice = (
        "param_scheduler: leave out its 'end' and 'T_max' and they follow train_cfg; of "
        "MultiStepLR set 'milestones', or take MultiStepShareLR with 'shares' of the run"
    )
    if isinstance(last, MultiStepParamScheduler):
        if not _HALF * total <= finish < total:
            yield f"{name} falls last at iteration {finish}, the run ends at {total}; {advice}"
    elif finish < (1 - _ROUNDING) * total:
        climbs = isinstance(last, CosineAnnealingParamScheduler)
        what = "climbs back to its base" if climbs else "stands still"
        yield f"{name} ends at iteration {finish} of {total} and then {what}; {advice}"
    elif finish > (1 + _ROUNDING) * total:
        yield (
            f"{name} ends at iteration {finish}, the run at {total}: its last checkpoint is "
            f"trained before the rate has come down; {advice}"
        )


def _finish(scheduler, epoch_length: int) -> int:
    """Iteration at which a schedule has made its way."""
    unit = epoch_length if scheduler.by_epoch else 1
    if isinstance(scheduler, MultiStepParamScheduler):
        return max(scheduler.milestones) * unit
    if isinstance(scheduler, CosineAnnealingParamScheduler):
        return (scheduler.begin + scheduler.T_max) * unit
    if isinstance(scheduler, WarmupOneCycleLR):
        return scheduler.total_iters
    return scheduler.end * unit
