"""Evaluation of a folder of images, with or without classes, and what a run made of its start."""

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import DATASETS, HOOKS
from torch import nn

from dinov3_mm.engine.runner.files import latest_export_path
from dinov3_mm.evaluation.held_out import HeldOutSplit
from dinov3_mm.evaluation.records import RECORD_FILE, read_records

from .evaluation import KNNEvalHook, RetrievalEvalHook
from .evaluation_base import FrozenFeatureHook
from .export import place_of_exports

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
