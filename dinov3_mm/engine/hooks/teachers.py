"""Life of the frozen teachers: Gram (arXiv 2508.10104, section 4), distillation."""

import math
from collections.abc import Mapping
from os import PathLike

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.distributed.tensor import DTensor

from dinov3_mm.checkpoints.load import reading_for_shards
from dinov3_mm.engine.optim import build_schedule
from dinov3_mm.models.pretraining import DistillationTeachers
from dinov3_mm.models.wrapping import unwrapped


@HOOKS.register_module()
class GramAnchorHook(Hook):
    """Fills and refreshes the Gram teacher, and sets the weight of the Gram term.

    The model's ``gram`` config says what the teacher is:

    - ``teacher='frozen'``: a backbone of its own, read from ``checkpoint``, or copied from the EMA
      teacher before iteration ``load_ema_at`` (the weight is 0 until then), or both; with neither
      the weights that the model came with (``model.load_gram_teacher``, ``load_from``). With
      ``rep_update`` it is replaced by the EMA teacher from time to time. The data must have crops
      for it (``gram_size`` of the multi-crop transform).
    - ``teacher='ema'``: the EMA teacher of the moment, on the student's own crops; none of the
      arguments but ``weight`` applies.

    Args:
        checkpoint: Weights in any format that the checkpoints package reads, e.g. a teacher export
            of the first stage. When a run is resumed that has its Gram teacher already, the file is
            not read.
        load_ema_at: Iteration before which the EMA teacher is copied; -1 for never.
        rep_update: Whether to refresh: after iteration ``it`` if ``it + 1 >= first_update`` and
            ``it + 1`` is a multiple of ``update_interval``.
        first_update: See ``rep_update``.
        update_interval: See ``rep_update``.
        max_updates: Largest number of refreshes; ``None`` for no limit.
        weight: Schedule of the term's weight; ``None`` for the model's own ``gram.weight``.

    Raises:
        ValueError: Arguments that contradict each other or the model's ``gram`` config, or batches
            with or without Gram crops against what the teacher needs.
    """

    priority = "HIGH"

    def __init__(
        self,
        checkpoint: str | PathLike | None = None,
        load_ema_at: int = -1,
        rep_update: bool = False,
        first_update: int = 0,
        update_interval: int | None = None,
        max_updates: int | None = None,
        weight: dict | float | None = None,
    ):
        if rep_update and (not isinstance(update_interval, int) or update_interval < 1):
            raise ValueError(
                f"rep_update needs update_interval, an integer >= 1, given {update_interval!r}"
            )
        if not rep_update and (first_update, update_interval, max_updates) != (0, None, None):
            raise ValueError(
                "first_update, update_interval and max_updates are of no use without "
                "rep_update=True"
            )
        if load_ema_at < -1:
            raise ValueError(f"load_ema_at is an iteration, or -1 for never, given {load_ema_at}")
        self.checkpoint = checkpoint
        self.load_ema_at = load_ema_at
        self.rep_update = rep_update
        self.first_update = first_update
        self.update_interval = update_interval
        self.max_updates = max_updates
        self.weight_cfg = weight
        self.num_updates = 0

    def before_train(self, runner) -> None:
        """Check the mode, fill the teacher, restore the count of refreshes."""
        self.model = unwrapped(runner.model)
        gram = self.model.gram
        if gram is None:
            raise ValueError("GramAnchorHook needs a model with gram=dict(...)")
        self.is_live = gram["teacher"] == "ema"
        weight = gram["weight"] if self.weight_cfg is None else self.weight_cfg
        self.weight = build_schedule(weight, runner.max_iters)
        self._is_batch_checked = False
        if self.is_live:
            self._check_live()
        else:
            self._fill(runner)
            self.num_updates = self._updates_before(runner.iter)

    def _check_live(self) -> None:
        if self.checkpoint is not None or self.load_ema_at >= 0 or self.rep_update:
            raise ValueError(
                "gram teacher='ema' is the EMA teacher itself: checkpoint, load_ema_at and "
                "rep_update do not apply; remove them or use teacher='frozen'"
            )

    def _fill(self, runner) -> None:
        """Give a frozen Gram teacher its first weights, unless a later iteration does."""
        if runner.iter > 0 and self.model.gram_teacher_ready:
            runner.logger.info("Gram teacher: as in the checkpoint that the run was resumed from")
            return
        if self.checkpoint is None and self.load_ema_at < 0:
            if self.model.gram_teacher_ready:
                runner.logger.info("Gram teacher: the weights that the model came with")
                return
            raise ValueError(
                "gram teacher='frozen' needs weights: give GramAnchorHook checkpoint=FILE (e.g. a "
                "teacher export) or load_ema_at=ITERATION, or call model.load_gram_teacher(FILE) "
                "before training"
            )
        if self.load_ema_at >= runner.max_iters:
            raise ValueError(
                f"load_ema_at={self.load_ema_at} is after the run's {runner.max_iters} iterations"
            )
        if self.checkpoint is not None:
            runner.logger.info(f"Gram teacher: {self.model.load_gram_teacher(self.checkpoint)}")
        elif runner.iter > self.load_ema_at:
            raise ValueError(
                f"the run starts at iteration {runner.iter}, after load_ema_at={self.load_ema_at}, "
                "and the checkpoint has no Gram teacher; give checkpoint=FILE or a later iteration"
            )

    def _updates_before(self, it: int) -> int:
        """Refreshes that an uninterrupted run has done before iteration ``it``."""
        if not self.rep_update:
            return 0
        first = max(1, self.first_update)
        # Multiples of the interval in first..it.
        count = it // self.update_interval - (first - 1) // self.update_interval
        return min(max(0, count), it if self.max_updates is None else self.max_updates)

    def before_train_iter(self, runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Copy the EMA teacher if it is time; set the weight."""
        it = runner.iter
        if not self._is_batch_checked:
            self._check_batch(data_batch)
        if it == self.load_ema_at:
            self.model.copy_teacher_to_gram()
            runner.logger.info(f"Gram teacher: the EMA teacher as of iteration {it}")
        is_empty = self.checkpoint is None and it < self.load_ema_at
        self.model.set_step(gram_weight=0.0 if is_empty else self.weight(it))

    def _check_batch(self, batch: dict) -> None:
        has_crops = batch.get("gram_crops") is not None
        if self.is_live and has_crops:
            raise ValueError(
                "the data has gram crops, but gram teacher='ema' looks at the student's crops; set "
                "gram_size=None in the transform"
            )
        if not self.is_live and not has_crops:
            raise ValueError(
                "gram teacher='frozen' needs its own crops: set gram_size in the transform"
            )
        self._is_batch_checked = True

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        """Refresh the Gram teacher if it is time."""
        done = runner.iter + 1
        is_due = self.rep_update and done >= self.first_update and done % self.update_interval == 0
        if is_due and (self.max_updates is None or self.num_updates < self.max_updates):
            self.model.copy_teacher_to_gram()
            self.num_updates += 1
            limit = "" if self.max_updates is None else f" of {self.max_updates}"
            runner.logger.info(
                f"Gram teacher: the EMA teacher after iteration {done} (update "
                f"{self.num_updates}{limit})"
            )


STATE_KEY = "distillation_teacher"


@HOOKS.register_module()
class DistillationHook(Hook):
    """Gives the frozen distillation teacher, or several, their weights before training.

    Training checkpoints do not hold the teacher: the file is read again when a run is resumed, and
    must still hold the same weights. Of a teacher in shards each rank reads its own.

    Args:
        checkpoint: Backbone and both heads: a training checkpoint (its EMA teacher is taken) or an
            official teacher export. ``'random'`` keeps random weights, for tests. For several
            teachers a dict: the file of each by its name.

    Raises:
        ValueError: In ``before_train``: no file, a model without distillation teacher, weights
            that do not fit, or another teacher than that with which the resumed run began.
    """

    priority = "HIGH"

    def __init__(self, checkpoint: str | PathLike | Mapping[str, str | PathLike] | None = None):
        self.checkpoint = checkpoint
        self._fingerprint: dict[str, float] = {}
        self._expected: dict[str, float] | None = None

    def before_train(self, runner) -> None:
        """Load the weights, and compare them with those of the resumed run."""
        model = unwrapped(runner.model)
        teacher = getattr(model, "distillation_teacher", None)
        if teacher is None:
            raise ValueError(
                "DistillationHook needs a model with a distillation teacher: "
                "DINOv3(distillation=dict(...)) or MultiDistillation"
            )
        if self.checkpoint is None:
            raise ValueError(
                "the distillation teacher needs weights: give DistillationHook checkpoint=FILE "
                "(tools/train.py: --teacher FILE), a training checkpoint or teacher export with "
                "backbone and heads"
            )
        if isinstance(self.checkpoint, Mapping) and not isinstance(teacher, DistillationTeachers):
            raise ValueError(
                f"the model has one distillation teacher: give DistillationHook checkpoint=FILE, "
                f"not {dict(self.checkpoint)}"
            )
        is_sharded = any(isinstance(param, DTensor) for param in teacher.parameters())
        with reading_for_shards(is_sharded):
            runner.logger.info(f"distillation teacher: {teacher.load(self.checkpoint)}")
        self._fingerprint = teacher.fingerprint()
        if self._expected is not None:
            self._compare()

    def _compare(self) -> None:
        for name, value in self._expected.items():
            if not math.isclose(value, self._fingerprint.get(name, math.nan), rel_tol=1e-6):
                raise ValueError(
                    f"{self.checkpoint} is not the teacher with which the resumed run began: the "
                    f"mean absolute value of its {name} is {self._fingerprint.get(name)}, it was "
                    f"{value}. Give the same file, or start a new stage with load_from"
                )

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Keep what the teacher is known by."""
        several = isinstance(self.checkpoint, Mapping)
        file = dict(self.checkpoint) if several else str(self.checkpoint)
        checkpoint[STATE_KEY] = {"file": str(file), "fingerprint": self._fingerprint}

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Remember what the teacher of a resumed run is known by."""
        if runner._resume and STATE_KEY in checkpoint:
            self._expected = checkpoint[STATE_KEY]["fingerprint"]
