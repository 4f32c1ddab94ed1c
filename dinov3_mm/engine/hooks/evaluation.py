"""Hooks that evaluate the teacher's frozen features while it trains, and sum up the run."""

from abc import abstractmethod
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from time import perf_counter

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import DATASETS, HOOKS
from torch import Tensor, nn

from dinov3_mm.datasets.evaluation_images import (
    CachedImages,
    HeldOutSplit,
    ImageSet,
    check_semantic_classes,
    paired_labels,
)
from dinov3_mm.engine.run_files import latest_export_path
from dinov3_mm.evaluation.dense_probe import dense_linear_probe, stack_masks
from dinov3_mm.evaluation.knn import chance_level, knn_classify
from dinov3_mm.evaluation.records import RECORD_FILE, TrainingClock, append_record, read_records
from dinov3_mm.evaluation.retrieval import RandomViews, two_crop_retrieval
from dinov3_mm.features.frozen import (
    Features,
    Sharing,
    extract_features,
    preserved_random_state,
    sum_over_ranks,
    together,
)
from dinov3_mm.models.pretraining.diagnostics import effective_rank
from dinov3_mm.models.wrapping import unwrapped

from .checkpoint import place_of_exports

# --- When and how a hook evaluates, whatever it measures ---


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
    # Of its records and of ``eval/<name>_<score>``; the score that is compared with the start.
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
        model = unwrapped(runner.model)
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
            scores = self.evaluate(self._backbone(unwrapped(runner.model)))
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


# --- What is measured ---


@HOOKS.register_module()
class KNNEvalHook(FrozenFeatureHook):
    """k-NN accuracy of the CLS and the mean patch token, and the effective rank of the CLS tokens.

    Args:
        interval, image_size and keyword options: see `FrozenFeatureHook`.
        train_source, test_source: configs of labelled sources for the DATASETS registry. Their
            classes are matched by name, see
            :func:`~dinov3_mm.datasets.evaluation_images.paired_labels`.
        k: neighbourhood sizes.
        temperature: of the votes.
    """

    name = "knn"

    def __init__(
        self,
        interval: int,
        train_source: dict,
        test_source: dict,
        image_size: int,
        k: Sequence[int] = (10, 20),
        *,
        temperature: float = 0.07,
        **options,
    ) -> None:
        super().__init__(interval, image_size, **options)
        self.train_source, self.test_source = train_source, test_source
        self.k, self.temperature = tuple(k), temperature
        self.headline = f"cls_top1_k{self.k[0]}"

    def prepare(self) -> None:
        """Build both sources and read their labels."""
        self.train, self.test = self.build_set(self.train_source), self.build_set(self.test_source)
        self.labels = paired_labels(self.train.source, self.test.source)
        if max(self.k) > len(self.train):
            raise ValueError(f"k={max(self.k)} exceeds the {len(self.train)} training images")
        self.chance = chance_level(*self.labels)
        self.num_classes = int(max(labels.max() for labels in self.labels)) + 1

    def evaluate(self, backbone: nn.Module) -> dict[str, float]:
        """Top-1 (and top-5) in percent by token and k."""
        train, test = self.extract(backbone, self.train), self.extract(backbone, self.test)
        pairs = {"cls": (train.cls, test.cls), "patch": (train.mean_patch, test.mean_patch)}
        scores = {}
        for token, (references, queries) in pairs.items():
            results = knn_classify(
                references,
                self.labels[0],
                queries,
                self.labels[1],
                self.k,
                self.temperature,
                num_classes=self.num_classes,
                shared=True,
            )
            for k, score in results.items():
                scores[f"{token}_top1_k{k}"] = score.top1
                if score.top5 is not None:
                    scores[f"{token}_top5_k{k}"] = score.top5
        return {**scores, "effective_rank": _rank_of(test.cls), "chance": self.chance}

    def describe(self, scores: dict[str, float]) -> str:
        """One line of top-1 accuracies."""
        parts = []
        for token, title in (("cls", "CLS"), ("patch", "mean patch")):
            values = [f"{scores[f'{token}_top1_k{k}']:.1f} % (k={k})" for k in self.k]
            parts.append(f"{title} {', '.join(values)}")
        return (
            f"k-NN top-1 {'; '.join(parts)}; chance {scores['chance']:.1f} %; "
            f"effective rank {scores['effective_rank']:.1f}"
        )


@HOOKS.register_module()
class DenseProbeHook(FrozenFeatureHook):
    """mIoU of a linear patch classifier fitted in closed form.

    Args:
        interval, image_size and keyword options: see `FrozenFeatureHook`.
        train_source, test_source: configs of sources with semantic masks.
        normalization: ``'standardize'`` or ``'l2'``.
    """

    name = "dense"
    headline = "patch_miou"

    def __init__(
        self,
        interval: int,
        train_source: dict,
        test_source: dict,
        image_size: int,
        *,
        normalization: str = "standardize",
        **options,
    ) -> None:
        super().__init__(interval, image_size, **options)
        self.train_source, self.test_source = train_source, test_source
        self.normalization = normalization

    def prepare(self) -> None:
        """Build both sources and read their masks."""
        self.train, self.test = self.build_set(self.train_source), self.build_set(self.test_source)
        self.masks = [
            stack_masks(images, Sharing(True).rows(len(images)))
            for images in (self.train, self.test)
        ]
        self.num_classes = check_semantic_classes(self.train.source, self.test.source)

    def evaluate(self, backbone: nn.Module) -> dict[str, float]:
        """Patch and pixel mIoU and accuracy in percent, and the chosen ridge."""
        train, test = (
            self.extract(backbone, images, patches=True, gather=False).patches
            for images in (self.train, self.test)
        )
        result = dense_linear_probe(
            train,
            self.masks[0],
            test,
            self.masks[1],
            self.num_classes,
            normalization=self.normalization,
            shared=True,
        )
        scores = result.to_dict()
        del scores["class_iou"]
        return scores

    def describe(self, scores: dict[str, float]) -> str:
        """mIoU and accuracy in one line."""
        return (
            f"dense probe mIoU {scores['patch_miou']:.1f} % (patches), "
            f"{scores['pixel_miou']:.1f} % (pixels); accuracy {scores['patch_accuracy']:.1f} %; "
            f"chance mIoU {scores['chance_miou']:.1f} %"
        )


@HOOKS.register_module()
class RetrievalEvalHook(FrozenFeatureHook):
    """Two-crop retrieval for images without labels, and the effective rank of the CLS tokens.

    Args:
        interval, image_size and keyword options: see `FrozenFeatureHook` (``resize_size`` has no
            part: views are random crops resized to ``image_size``).
        source: config of a source.
        seed: of the views.
    """

    name = "retrieval"
    headline = "cls_top1"

    def __init__(
        self, interval: int, source: dict, image_size: int, *, seed: int = 0, **options
    ) -> None:
        if "resize_size" in options:
            raise ValueError("retrieval views are random crops: resize_size does not apply")
        super().__init__(interval, image_size, **options)
        self.source, self.seed = source, seed

    def prepare(self) -> None:
        """Build the source and its two sets of views."""
        source = DATASETS.build(self.source)
        self.views = [
            RandomViews(source, self.image_size, view, seed=self.seed, cache=self.cache)
            for view in (0, 1)
        ]

    def evaluate(self, backbone: nn.Module) -> dict[str, float]:
        """Top-1 in percent by token."""
        first, second = (self.extract(backbone, views) for views in self.views)
        return {
            "cls_top1": two_crop_retrieval(first.cls, second.cls, shared=True),
            "patch_top1": two_crop_retrieval(first.mean_patch, second.mean_patch, shared=True),
            "effective_rank": _rank_of(first.cls),
            "chance": 100 / len(first.cls),
        }

    def describe(self, scores: dict[str, float]) -> str:
        """Top-1 in one line."""
        return (
            f"two-crop retrieval top-1 CLS {scores['cls_top1']:.1f} %, mean patch "
            f"{scores['patch_top1']:.1f} %; chance {scores['chance']:.2f} %; effective rank "
            f"{scores['effective_rank']:.1f}"
        )


def _rank_of(features: Tensor) -> float:
    """Effective rank of gathered features; a decomposition has no parts: one rank computes it."""
    value = together(
        "the effective rank", lambda: effective_rank(features) if is_main_process() else 0.0
    )
    (total,) = sum_over_ranks(torch.tensor(value, dtype=torch.float64))
    return total.item()


# --- A folder with or without classes, and what a run made of its start ---


_NEIGHBOURS = (10, 20)


@HOOKS.register_module()
class FolderEvalHook(FrozenFeatureHook):
    """k-NN of held-out images where folders are classes, else two-crop retrieval of them.

    Train with ``HeldOutSplit(source, part='train', every=...)`` of the same source and number.

    Args:
        interval, image_size and keyword options: see `FrozenFeatureHook`.
        source: config of the whole source.
        every: one image in how many is held out, see ``HeldOutSplit``.
        use_classes: take the folders for classes; by default if there are two or more.
        max_images: largest number of images on either side, spread evenly over it.
    """

    name = "folder"
    headline = "score"

    def __init__(
        self,
        interval: int,
        source: dict,
        image_size: int,
        *,
        every: int,
        use_classes: bool | None = None,
        max_images: int = 10_000,
        **options,
    ) -> None:
        super().__init__(interval, image_size, **options)
        self.source, self.every = source, every
        self.use_classes, self.max_images = use_classes, max_images
        self.options = options

    def prepare(self) -> None:
        """Look at the folder, choose the evaluation and prepare it."""
        source = DATASETS.build(self.source)
        has_classes = len(getattr(source, "classes", ())) >= 2
        if self.use_classes and not has_classes:
            raise ValueError("use_classes=True needs images in two or more class folders")
        parts = {part: HeldOutSplit(source, part, self.every) for part in ("train", "test")}
        self._chosen = (
            self._knn(parts)
            if (has_classes if self.use_classes is None else self.use_classes)
            else self._retrieval(parts["test"] if len(parts["test"]) >= 2 else source)
        )
        self.name, self.headline = self._chosen.name, self._chosen.headline
        self._chosen.statistics, self._chosen.dtype = self.statistics, self.dtype
        self._chosen.prepare()

    def _knn(self, parts: dict[str, HeldOutSplit]) -> KNNEvalHook:
        classes = parts["train"].classes
        shown = ", ".join(classes[:4]) + (", ..." if len(classes) > 4 else "")
        print_log(
            f"evaluation: k-NN over {len(classes)} class folders ({shown}), "
            f"{len(parts['train'])} images against {len(parts['test'])} held-out ones",
            logger="current",
        )
        neighbours = sorted({min(k, len(parts["train"])) for k in _NEIGHBOURS})
        train, test = self._readable(parts["train"]), self._readable(parts["test"])
        return KNNEvalHook(self.interval, train, test, self.image_size, neighbours, **self.options)

    def _retrieval(self, source: object) -> RetrievalEvalHook:
        beside = getattr(getattr(source, "source", source), "stray", "")
        why = f", and {beside} lies beside them" if beside else ""
        print_log(
            f"evaluation: two-crop retrieval among {min(len(source), self.max_images)} images "
            f"(k-NN needs one folder a class{why})",
            logger="current",
        )
        return RetrievalEvalHook(
            self.interval, self._readable(source), self.image_size, **self.options
        )

    def _readable(self, source: object) -> dict:
        """Config of a sample of a source that is built already."""
        return dict(type="ReadableSubset", source=dict(type=lambda: source), length=self.max_images)

    def evaluate(self, backbone: nn.Module) -> dict[str, float]:
        """Scores of the chosen evaluation."""
        return self._chosen.evaluate(backbone)

    def describe(self, scores: dict[str, float]) -> str:
        """Those scores in words."""
        return self._chosen.describe(scores)


@HOOKS.register_module()
class SummaryHook(Hook):
    """Says at the end of a run what it made of its starting point, and which file to use."""

    # After the last evaluation and the last export.
    priority = "LOWEST"

    def after_train(self, runner) -> None:
        """Compare the last evaluation with the first."""
        if not is_main_process():
            return
        for hook in runner.hooks:
            if isinstance(hook, FrozenFeatureHook):
                self._compare(runner, hook)
        path = latest_export_path(*place_of_exports(runner))
        if path.exists():
            runner.logger.info(f"the file to use: {path} (dinov3_mm.build_backbone(FILE))")

    def _compare(self, runner, hook: FrozenFeatureHook) -> None:
        records = read_records(f"{runner.work_dir}/{RECORD_FILE}", hook.name)
        if len(records) < 2 or records[0]["step"] != 0:
            return
        start, end = (record[hook.headline] for record in (records[0], records[-1]))
        runner.logger.info(
            f"{hook.name} {hook.headline}: {start:.1f} at the start, {end:.1f} after "
            f"{records[-1]['step']} iterations ({end - start:+.1f})"
        )
        if end < start:
            runner.logger.warning(
                "the starting point was better on these images: the weights as they were may "
                "serve you better. Lower the learning rate, anchor with a Gram teacher "
                "(continue_gram configs), or give more images"
            )
