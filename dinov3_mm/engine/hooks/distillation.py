"""Life of the distillation teacher: where its weights come from, whether it is still the same."""

import math
from collections.abc import Mapping
from os import PathLike

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch.distributed.tensor import DTensor

from dinov3_mm.checkpoints.unread import reading_for_shards
from dinov3_mm.models.pretraining import DistillationTeachers

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
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
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
