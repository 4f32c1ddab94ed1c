"""When and how a hook evaluates a frozen backbone within a run, whatever it measures."""

from abc import abstractmethod
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from time import perf_counter

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import DATASETS
from torch import nn

from dinov3_mm.evaluation.features import (
    Features,
    extract_features,
    preserved_random_state,
)
from dinov3_mm.evaluation.images import CachedImages, ImageSet
from dinov3_mm.evaluation.ranks import together
from dinov3_mm.evaluation.records import RECORD_FILE, TrainingClock, append_record, read_records

CLOCK_KEY = "training_clock"
SECONDS_KEY = "training_seconds"


class FrozenFeatureHook(Hook):
    """Evaluate a backbone at the starting point, every ``interval`` iterations and at the end.

    Scores go to the log, to the visualizer and the message hub (as ``eval/<name>_<score>``), and,
    with the training seconds so far, to ``<work_dir>/evaluations.jsonl``. Evaluation runs under its
    own random state, so training proceeds as if the hook were absent.

    Everything is computed on the training device, in fp32 but for the backbone's ``dtype``, and
    shared by the ranks: each extracts and judges its part of the images. Scores are those of one
    process. What fails on one rank ends all of them.

    Args:
        interval: iterations between evaluations.
        image_size: side of the square inputs, a multiple of the patch size.
        resize_size: short side before the centre crop, by default ``image_size``.
        at_start: evaluate before the first iteration; a resumed run has no starting point.
        backbone: attribute path of the backbone within the model.
        mean, std: per-channel statistics in [0, 1] of the backbone's inputs; by default those of
            the model's data preprocessor.
        dtype: ``'fp32'`` or ``'bf16'`` (autocast); by default the model's ``compute_dtype``, and
            ``'fp32'`` for a model without one.
        batch_size: images per forward of one process.
        num_workers: loading processes; with 0 and ``cache`` the inputs stay in memory.
        cache: keep this rank's share of the inputs in memory between evaluations.
    """

    # After the teacher update (NORMAL and above), before checkpoints and exports (VERY_LOW).
    priority = "LOW"
    name: str
    headline: str

    def __init__(
        self,
        interval: int,
        image_size: int,
        *,
        resize_size: int | None = None,
        at_start: bool = True,
        backbone: str = "teacher.backbone",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        cache: bool = True,
    ) -> None:
        if interval < 1:
            raise ValueError(f"interval must be a positive number of iterations, got {interval}")
        if dtype not in (None, "fp32", "bf16"):
            raise ValueError(f"dtype must be 'fp32' or 'bf16', got {dtype!r}")
        if cache and num_workers:
            raise ValueError(
                "cached inputs are loaded in this process: num_workers=0 or cache=False"
            )
        self.interval, self.at_start, self.backbone_path = interval, at_start, backbone
        self.image_size, self.resize_size, self.cache = image_size, resize_size, cache
        self.dtype = dtype
        self._last_step: int | None = None
        if (mean is None) != (std is None):
            raise ValueError("mean and std belong together: give both or neither")
        self.statistics = None if mean is None else (tuple(mean), tuple(std))
        self.loading = {"batch_size": batch_size, "num_workers": num_workers}

    @abstractmethod
    def prepare(self) -> None:
        """Build the image sets, before training starts, so that mistakes show at once."""

    @abstractmethod
    def evaluate(self, backbone: nn.Module) -> dict[str, float]:
        """Scores of the backbone by name."""

    @abstractmethod
    def describe(self, scores: dict[str, float]) -> str:
        """Scores in words for the log."""

    def before_train(self, runner) -> None:
        """Build the sources and measure the starting point."""
        model = _unwrapped(runner.model)
        self.statistics = self.statistics or _statistics_of(model)
        self.dtype = self.dtype or getattr(model, "compute_dtype", "fp32")
        clock = _clock(runner)
        with clock.paused(), preserved_random_state():
            together(f"preparing the evaluation {self.name!r}", self.prepare)
        backbone = self._backbone(model)
        rank_words = f", shared by {runner.world_size} ranks" if runner.world_size > 1 else ""
        runner.logger.info(
            f"evaluation {self.name!r}: features in {self.dtype} on "
            f"{next(backbone.parameters()).device.type}{rank_words}"
        )
        if self.at_start and runner.iter == 0:
            self._run(runner, step=0)
        clock.start()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Evaluate at the interval and after the last iteration."""
        if self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner):
            self._run(runner, step=runner.iter + 1)

    def after_train(self, runner) -> None:
        """Evaluate where a hook ended the run before its last iteration."""
        if self._last_step != runner.iter < runner.max_iters:
            self._run(runner, step=runner.iter)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Keep the training time, so that a resumed run counts on."""
        checkpoint[SECONDS_KEY] = _clock(runner).seconds

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Take over the training time of the run that is resumed."""
        if runner._resume:
            _clock(runner).restore(checkpoint.get(SECONDS_KEY, 0.0))

    def build_set(self, source: dict) -> ImageSet:
        """Image set of a source config."""
        return ImageSet(DATASETS.build(source), self.image_size, self.resize_size, cache=self.cache)

    def extract(
        self,
        backbone: nn.Module,
        images: CachedImages,
        *,
        patches: bool = False,
        gather: bool = True,
    ) -> Features:
        """Features of a set under the hook's settings, on the backbone's device."""
        mean, std = self.statistics
        amp_dtype = torch.bfloat16 if self.dtype == "bf16" else None
        return extract_features(
            backbone,
            images,
            mean=mean,
            std=std,
            patches=patches,
            amp_dtype=amp_dtype,
            device=None,
            gather=gather,
            **self.loading,
        )

    def _run(self, runner, step: int) -> None:
        clock = _clock(runner)
        with clock.paused(), preserved_random_state():
            started = perf_counter()
            scores = self.evaluate(self._backbone(_unwrapped(runner.model)))
            spent = perf_counter() - started
        self._last_step = step
        tagged = {f"eval/{self.name}_{key}": value for key, value in scores.items()}
        runner.visualizer.add_scalars(tagged, step=step)
        runner.message_hub.update_scalars(tagged)
        record_file = Path(runner.work_dir) / RECORD_FILE
        record = {"name": self.name, "step": step, "seconds": clock.seconds, **scores}

        def write() -> None:
            if is_main_process():
                append_record(record_file, record)

        together("writing the scores", write)
        runner.logger.info(self._message(step, clock.seconds, scores, spent, record_file))

    def _message(
        self, step: int, seconds: float, scores: dict[str, float], spent: float, record_file: Path
    ) -> str:
        text = f"{self.describe(scores)} [{spent:.1f} s]"
        if step == 0:
            return f"starting point: {text}"
        first = next(iter(read_records(record_file, self.name)), None)
        if first is not None and first["step"] == 0:
            text += f"; starting point {first[self.headline]:.1f}"
        return f"iteration {step} ({seconds / 60:.1f} min of training): {text}"

    def _backbone(self, model: nn.Module) -> nn.Module:
        try:
            return attrgetter(self.backbone_path)(model)
        except AttributeError as error:
            raise AttributeError(
                f"{type(self).__name__} looks for the backbone at {self.backbone_path!r}, which "
                f"{type(model).__name__} does not have ({error}): give its path as backbone=..."
            ) from error


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a distributed wrapper."""
    return model.module if is_model_wrapper(model) else model


def _statistics_of(model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the model's data preprocessor, so that the config has them once."""
    preprocessor = getattr(model, "data_preprocessor", None)
    if not hasattr(preprocessor, "statistics"):
        raise ValueError(
            f"the data preprocessor {type(preprocessor).__name__} of {type(model).__name__} has no "
            "image statistics: give the evaluation hook mean=... and std=..."
        )
    return preprocessor.statistics


def _clock(runner) -> TrainingClock:
    """The run's clock, shared by its evaluation hooks."""
    clock = runner.message_hub.get_info(CLOCK_KEY)
    if clock is None:
        clock = TrainingClock()
        runner.message_hub.update_info(CLOCK_KEY, clock, resumed=False)
    return clock
