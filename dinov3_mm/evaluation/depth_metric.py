"""Metrics of depth maps for MMEngine's evaluator: per image, averaged over images."""

import logging
from collections.abc import Sequence

import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmengine.registry import METRICS
from torch import Tensor
from torch.nn import functional as F

from dinov3_mm.suggest import hint

from .depth_scores import CROPS, SCORES, depth_scores, scale_and_shift, valid_depth

ALIGNMENTS = ("least_squares",)


@METRICS.register_module()
class DINOv3DepthMetric(BaseMetric):
    """The depth scores of the DINOv3 evaluations.

    A prediction is resized bilinearly to its truth, aligned if asked, limited to the range and
    compared where the truth lies inside it. Every image counts the same; images without such a
    pixel do not count.

    Args:
        scores: which of ``a1, a2, a3, abs_rel, rmse, log_10, rmse_log, silog, sq_rel, mae``.
        min_depth, max_depth: range, in the unit of the depth.
        crop: 'eigen' (NYUv2), 'garg' (KITTI) or None for the whole map.
        align: 'least_squares' finds scale and shift of every image before, as for models of
            relative depth.
        collect_device, prefix: see ``BaseMetric``.

    Raises:
        ValueError: if a name is unknown, or the range is no range; on use, if no image has a pixel
            that counts.
    """

    default_prefix = "depth"

    def __init__(
        self,
        scores: Sequence[str] = ("a1", "abs_rel", "rmse"),
        *,
        min_depth: float = 1e-3,
        max_depth: float = 10.0,
        crop: str | None = None,
        align: str | None = None,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        _check("crop", [crop] if crop else [], CROPS)
        _check("align", [align] if align else [], ALIGNMENTS)
        _check("scores", scores, SCORES)
        if not 0 < min_depth < max_depth:
            raise ValueError(
                f"depths from {min_depth} to {max_depth} are no range; expected 0 < min < max"
            )
        self.scores = tuple(scores)
        self.range = (min_depth, max_depth)
        self.crop = crop
        self.align = align

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Score the maps ``pred_depth_map`` and ``gt_depth_map`` of samples."""
        for sample in data_samples:
            pred, target = maps_of(sample)
            self.results.append(self.score(pred, target))

    def score(self, pred: Tensor, target: Tensor) -> dict[str, float]:
        """Scores of one map (H, W)."""
        mask = valid_depth(target, *self.range)
        if self.crop is not None:
            mask &= CROPS[self.crop](*target.shape).to(mask.device)
        pred, target = pred[mask], target[mask]
        if self.align is not None and len(pred):
            scale, shift = scale_and_shift(pred, target)
            pred = scale * pred + shift
        return depth_scores(pred.clamp(*self.range), target)

    def compute_metrics(self, results: list[dict[str, float]]) -> dict[str, float]:
        """Means over the images that have a pixel that counts."""
        table = torch.tensor([[row[name] for name in self.scores] for row in results])
        if table.isnan().all():
            raise ValueError(
                f"none of {len(results)} images has a depth between {self.range[0]} and "
                f"{self.range[1]}: look at the data set's depth_scale and the metric's range"
            )
        without = int(table.isnan().all(1).sum())
        if without:
            print_log(
                f"{without} of {len(results)} images have no depth between {self.range[0]} and "
                f"{self.range[1]} and do not count in the score",
                logger="current",
                level=logging.WARNING,
            )
        means = table.double().nanmean(0).tolist()
        return dict(zip(self.scores, means))


def maps_of(sample: dict) -> tuple[Tensor, Tensor]:
    """Prediction, resized to the truth, and truth (H, W) of a sample, both fp32.

    Raises:
        ValueError: if the sample has no truth.
    """
    if "gt_depth_map" not in sample:
        raise ValueError(
            f"{sample.get('img_path', 'a sample')} has no gt_depth_map; the test pipeline needs "
            "LoadDepthMap, and the data set depth maps"
        )
    target = sample["gt_depth_map"]["data"].float()
    target = target.reshape(target.shape[-2:])
    pred = sample["pred_depth_map"]["data"].float().to(target.device)
    pred = pred.reshape(1, 1, *pred.shape[-2:])
    if pred.shape[-2:] != target.shape:
        pred = F.interpolate(pred, size=target.shape, mode="bilinear", align_corners=False)
    return pred[0, 0], target


def _check(what: str, given: Sequence[str], known: Sequence[str] | dict) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{what}: {name!r} is unknown; {hint(name, known)}")
