"""Hooks that evaluate the teacher's frozen features while it trains."""

from collections.abc import Sequence

import torch
from mmengine.dist import is_main_process
from mmengine.registry import DATASETS, HOOKS
from torch import Tensor, nn

from dinov3_mm.evaluation.dense_probe import dense_linear_probe, stack_masks
from dinov3_mm.evaluation.images import check_semantic_classes, paired_labels
from dinov3_mm.evaluation.knn import chance_level, knn_classify
from dinov3_mm.evaluation.rank import effective_rank
from dinov3_mm.evaluation.ranks import Sharing, sum_over_ranks, together
from dinov3_mm.evaluation.retrieval import RandomViews, two_crop_retrieval

from .evaluation_base import FrozenFeatureHook


@HOOKS.register_module()
class KNNEvalHook(FrozenFeatureHook):
    """k-NN accuracy of the CLS and the mean patch token, and the effective rank of the CLS tokens.

    Args:
        interval, image_size and keyword options: see `FrozenFeatureHook`.
        train_source, test_source: configs of labelled sources for the DATASETS registry. Their
            classes are matched by name, see
            :func:`~dinov3_mm.evaluation.images.paired_labels`.
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
