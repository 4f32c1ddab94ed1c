"""Checks of downstream runs before they train: label maps, depth maps, schedules."""

from collections.abc import Callable, Iterator
from typing import Any

from mmengine.dist import broadcast_object_list, get_rank
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

from dinov3_mm.datasets.depth import LoadDepthMap
from dinov3_mm.datasets.depth_audit import DepthFacts, Range, judge_depths, look_at_depths
from dinov3_mm.datasets.label_audit import Report, judge_labels, look_at_labels, step_of
from dinov3_mm.engine.optim.head_schedules import WarmupOneCycleLR
from dinov3_mm.errors import ConfigError
from dinov3_mm.models.wrapping import unwrapped

# --- Label and depth maps ---


_SETS = {"train": "training", "val": "validation", "test": "test"}


class MapCheckHook(Hook):
    """Base: looks at the maps of all sets before the first iteration, and ends a run on faults.

    The first process looks, and all of them end with what it found.

    Args:
        max_maps: maps of a set to look at; of more, so many are drawn at random, always the same.
        max_seconds: time for a set.

    Raises:
        ValueError: if one of them is no positive number.
    """

    priority = "VERY_HIGH"

    def __init__(self, *, max_maps: int = 1000, max_seconds: float = 30.0) -> None:
        for name, value in (("max_maps", max_maps), ("max_seconds", max_seconds)):
            if not value > 0:
                raise ValueError(f"{type(self).__name__}: {name} is {value}; expected more than 0")
        self.max_maps = max_maps
        self.max_seconds = max_seconds

    def before_train(self, runner) -> None:
        """Look at training and validation data."""
        splits = ["train"] if runner.val_loop is None else ["train", "val"]
        self._check(runner, splits)

    def before_test(self, runner) -> None:
        """Look at test data."""
        self._check(runner, ["test"])

    def look(self, runner, splits: list[str]) -> Iterator[Report]:
        """A report on each set."""
        raise NotImplementedError

    def _check(self, runner, splits: list[str]) -> None:
        reports = on_first_rank(lambda: list(self.look(runner, splits)))
        for report in reports:
            for line in report.notes:
                runner.logger.info(line)
            for line in report.warnings:
                runner.logger.warning(line)
        errors = [line for report in reports for line in report.errors]
        if errors:
            raise ConfigError("\n".join(errors))


@HOOKS.register_module()
class LabelCheckHook(MapCheckHook):
    """Ends a segmentation run on labels that the head does not have, or that teach it nothing.

    On a GPU a label beyond the last class is an assertion in a kernel, without the label; in
    validation it is left out of the score without a word; masks of 0 and 255 leave one class. The
    names of the classes and the label maps are checked before the first step, see
    :func:`~dinov3_mm.datasets.label_audit.judge_labels`, those of every batch before they go to the
    device.

    Args:
        **kwargs: see :class:`MapCheckHook`.

    Raises:
        ConfigError: If a data set has another number of classes than ``decode_head.num_classes``,
            its label maps cannot be trained on or scored, or one holds a value that is neither a
            class nor the one to ignore.
    """

    def look(self, runner, splits: list[str]) -> Iterator[Report]:
        """A report on each set."""
        head, trained = _head(runner), None
        for split in splits:
            dataset = _dataset(runner, split)
            facts = look_at_labels(
                _SETS[split], dataset, max_maps=self.max_maps, max_seconds=self.max_seconds
            )
            if facts is None:
                continue
            yield judge_labels(
                facts,
                _classes(dataset),
                head.num_classes,
                is_training=split == "train",
                trained=trained,
                ignored=getattr(head, "ignore_index", 255),
            )
            trained = facts if split == "train" else None

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Check the label maps of a batch."""
        _check_batch(runner, data_batch)

    def before_val_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Check the label maps of a batch."""
        _check_batch(runner, data_batch)

    def before_test_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Check the label maps of a batch."""
        _check_batch(runner, data_batch)

    def _check(self, runner, splits: list[str]) -> None:
        for split in splits:
            _check_classes(runner, split, _dataset(runner, split))
        super()._check(runner, splits)


@HOOKS.register_module()
class DepthCheckHook(MapCheckHook):
    """Ends a depth run on maps in another unit, beyond the ranges, or without a measurement.

    See :func:`~dinov3_mm.datasets.depth_audit.judge_depths`.

    Args:
        **kwargs: see :class:`MapCheckHook`.

    Raises:
        ConfigError: If the depths of a set cannot be trained on or scored.
    """

    def look(self, runner, splits: list[str]) -> Iterator[Report]:
        """A report on each set."""
        head = _head(runner)
        of_head = list(_head_range(head))
        for split in splits:
            dataset = _dataset(runner, split)
            facts: DepthFacts | None = look_at_depths(
                _SETS[split],
                dataset,
                zero_is_valid=head.zero_is_valid,
                max_maps=self.max_maps,
                max_seconds=self.max_seconds,
            )
            if facts is None:
                continue
            ranges = of_head if split == "train" else list(_metric_ranges(runner, split))
            report = judge_depths(
                facts,
                ranges,
                is_training=split == "train",
                nodata_is_depth=head.zero_is_valid
                and any(
                    step_of(owner, LoadDepthMap).nodata_depth >= 0 for owner in facts.chosen.sets
                ),
            )
            if split != "train":
                report.warnings += _other_ranges(of_head, ranges)
            yield report


def on_first_rank(check: Callable[[], Any]) -> Any:
    """What a check gives on the first process; an error of its ends all of them."""
    answer: list = [None]
    error: Exception | None = None
    if get_rank() == 0:
        try:
            answer = [(check(), "")]
        except Exception as raised:
            # Whatever it is, the others must not wait for an answer.
            error, answer = raised, [(None, f"{type(raised).__name__}: {raised}")]
    broadcast_object_list(answer)
    if error is not None:
        raise error
    result, message = answer[0]
    if message:
        raise RuntimeError(f"the check of the maps on the first process failed: {message}")
    return result


def _head(runner):
    model = unwrapped(runner.model)
    return model.decode_head


def _dataset(runner, split: str):
    if split == "train":
        return runner.train_dataloader.dataset
    loop = runner.val_loop if split == "val" else runner.test_loop
    return loop.dataloader.dataset


def _classes(dataset) -> tuple[str, ...]:
    return tuple((getattr(dataset, "metainfo", None) or {}).get("classes") or ())


def _check_classes(runner, split: str, dataset) -> None:
    names, head = _classes(dataset), _head(runner)
    if names and len(names) != head.num_classes:
        raise ConfigError(
            f"{split}_dataloader.dataset has {len(names)} classes ({', '.join(names[:3])}, ...), "
            f"but model.decode_head.num_classes is {head.num_classes}: set "
            f"model.decode_head.num_classes={len(names)}, or the data set's metainfo.classes"
        )


def _check_batch(runner, data_batch) -> None:
    """Refuse labels that the head does not have; samples of augmented tests come in lists."""
    head = _head(runner)
    ignored = getattr(head, "ignore_index", 255)
    for sample in _samples(data_batch["data_samples"]):
        if getattr(sample, "gt_sem_seg", None) is None:
            continue
        labels = sample.gt_sem_seg.data
        wrong = labels[(labels >= head.num_classes) & (labels != ignored)]
        if wrong.numel():
            raise ConfigError(
                f"the label map of {sample.get('img_path', 'an image')} holds "
                f"{sorted(set(wrong.tolist()))[:5]}, and the head has classes 0 to "
                f"{head.num_classes - 1} and ignores {ignored}: set "
                "model.decode_head.num_classes, or reduce_zero_label=True in the data set if "
                "its 0 is unlabelled and classes begin at 1"
            )


def _samples(part) -> Iterator:
    if isinstance(part, (list, tuple)):
        for each in part:
            yield from _samples(each)
    else:
        yield part


def _head_range(head) -> Iterator[Range]:
    if head.bins is None:  # regression has no upper end
        return
    # Losses of relative depth know of a space in which maps are aligned.
    is_relative = all(hasattr(loss, "space") for loss in head.losses)
    yield Range(head.min_depth, head.max_depth, "model.decode_head.max_depth", is_relative)


def _metric_ranges(runner, split: str) -> Iterator[Range]:
    loop = runner.val_loop if split == "val" else runner.test_loop
    for metric in loop.evaluator.metrics:
        if hasattr(metric, "range"):
            low, high = metric.range
            is_aligned = getattr(metric, "align", None) is not None
            yield Range(low, high, f"{split}_evaluator.max_depth", is_aligned)
        elif hasattr(metric, "max_height"):
            # A height of 0 counts.
            yield Range(-1e-6, metric.max_height, f"{split}_evaluator.max_height")


def _other_ranges(of_head: list[Range], of_metrics: list[Range]) -> Iterator[str]:
    for head in of_head:
        for metric in of_metrics:
            if not (head.is_aligned or metric.is_aligned or head.high == metric.high):
                yield (
                    f"{head.option} is {head.high:g} and {metric.option} {metric.high:g}: depths "
                    "between them are trained and not scored, or scored and out of reach; set both "
                    "alike"
                )


# --- Schedules ---


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
