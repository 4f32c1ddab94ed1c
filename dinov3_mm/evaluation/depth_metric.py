"""Metrics of depth and canopy height: of one map, and for MMEngine's evaluator."""

import logging
from collections.abc import Callable, Sequence

import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmengine.registry import METRICS
from torch import Tensor
from torch.nn import functional as F

from dinov3_mm.errors import hint

# --- One map against its truth (as since arXiv 1406.2283) ---


def valid_depth(target: Tensor, min_depth: float, max_depth: float) -> Tensor:
    """Where a truth (..., H, W) was measured and lies between the two depths, exclusive."""
    return (target > min_depth) & (target < max_depth)


def eigen_crop(height: int, width: int) -> Tensor:
    """The part of NYUv2 maps that counts: rows 45 to 471, columns 41 to 601 of 480 x 640."""
    rows = (45 * height // 480, 471 * height // 480)
    return _window(height, width, rows, (41 * width // 640, 601 * width // 640))


def garg_crop(height: int, width: int) -> Tensor:
    """The part of KITTI maps that counts (arXiv 1603.04992)."""
    rows = (int(0.40810811 * height), int(0.99189189 * height))
    return _window(height, width, rows, (int(0.03594771 * width), int(0.96405229 * width)))


def _window(height: int, width: int, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[slice(*rows), slice(*columns)] = True
    return inside


CROPS: dict[str, Callable[[int, int], Tensor]] = {"eigen": eigen_crop, "garg": garg_crop}


def scale_and_shift(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of ``pred`` (K,) that bring it closest to ``target`` in squared error.

    A constant prediction gets scale 0 and the mean truth as shift.
    """
    pred, target = pred.double(), target.double()
    centered = pred - pred.mean()
    variance = centered.square().mean()
    covariance = (centered * (target - target.mean())).mean()
    scale = covariance / variance if variance > 0 else torch.zeros_like(variance)
    return scale, target.mean() - scale * pred.mean()


def depth_scores(pred: Tensor, target: Tensor) -> dict[str, float]:
    """Every score of :data:`SCORES`.

    Args:
        pred, target: depth (K,) of the pixels that count, positive.

    Returns:
        Scores by name, NaN if there are no pixels. Distances are in the unit of the depth,
        ``silog`` is times 100, the rest are fractions.
    """
    pred, target = pred.double(), target.double()
    error, ratio = pred - target, torch.maximum(pred / target, target / pred)
    log_error = target.log() - pred.log()
    log_mean_square = log_error.square().mean()
    silog = 100 * (log_mean_square - log_error.mean().square()).clamp_min(0).sqrt()
    scores = {
        "a1": (ratio < 1.25).double().mean(),
        "a2": (ratio < 1.25**2).double().mean(),
        "a3": (ratio < 1.25**3).double().mean(),
        "abs_rel": (error.abs() / target).mean(),
        "rmse": error.square().mean().sqrt(),
        "log_10": (target.log10() - pred.log10()).abs().mean(),
        "rmse_log": log_mean_square.sqrt(),
        "silog": silog,
        "sq_rel": (error.square() / target).mean(),
        "mae": error.abs().mean(),
    }
    return {name: value.item() for name, value in scores.items()}


SCORES = (
    "a1",
    "a2",
    "a3",
    "abs_rel",
    "rmse",
    "log_10",
    "rmse_log",
    "silog",
    "sq_rel",
    "mae",
)


# --- Metrics for MMEngine's evaluator ---


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


@METRICS.register_module()
class DINOv3CanopyMetric(BaseMetric):
    """Scores of canopy height over all pixels and blocks of a data set.

    - ``mae``: mean absolute error, in metres.
    - ``block_r2``: coefficient of determination of mean heights of square blocks. A block counts
      with its measured pixels, if they are at least half of it; blocks at the right and bottom
      border that are not whole do not count.

    Args:
        block_size: side of a block, in pixels of the truth. The published value is not known to us.
        max_height: the range of truth and prediction, in metres; a truth outside does not count,
            negative values mean 'not measured', 0 is bare ground.
        collect_device, prefix: see ``BaseMetric``.

    Raises:
        ValueError: on use, if no pixel counts.
    """

    default_prefix = "canopy"

    def __init__(
        self,
        *,
        block_size: int,
        max_height: float = 96.0,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; expected 1 or more pixels")
        self.block_size = block_size
        self.max_height = max_height

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Take sums of the maps ``pred_depth_map`` and ``gt_depth_map`` of samples."""
        for sample in data_samples:
            pred, target = (x.double().cpu() for x in maps_of(sample))
            mask = (target >= 0) & (target <= self.max_height)
            pred = pred.clamp(0, self.max_height)
            error = (pred - target)[mask].abs().sum().item()
            blocks = torch.stack(self._block_means(pred, target, mask)).numpy()
            self.results.append((error, int(mask.sum()), blocks))

    def _block_means(self, pred: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mean heights (K,) of the K blocks that count."""

        def share(values: Tensor) -> Tensor:
            if min(values.shape) < self.block_size:
                return values.new_zeros(0)
            return F.avg_pool2d(values[None, None], self.block_size).flatten()

        measured = share(mask.double())
        counts = measured >= 0.5
        pred, target = (share(x.masked_fill(~mask, 0.0)) for x in (pred, target))
        return pred[counts] / measured[counts], target[counts] / measured[counts]

    def compute_metrics(self, results: list) -> dict[str, float]:
        """``mae`` and ``block_r2`` (NaN with fewer than two blocks of different height)."""
        count = sum(number for _, number, _ in results)
        if not count:
            raise ValueError(
                f"none of {len(results)} maps has a height from 0 to {self.max_height}: look at "
                "the data set's depth_scale"
            )
        blocks = torch.cat([torch.from_numpy(blocks) for *_, blocks in results], dim=1)
        pred, target = blocks
        spread = (target - target.mean()).square().sum()
        r2 = 1 - (pred - target).square().sum() / spread if spread > 0 else torch.tensor(torch.nan)
        return {"mae": sum(error for error, *_ in results) / count, "block_r2": r2.item()}
