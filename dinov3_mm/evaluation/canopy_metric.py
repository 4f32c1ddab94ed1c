"""Metrics of canopy height: mean absolute error, and R^2 of blocks."""

from collections.abc import Sequence

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import Tensor
from torch.nn import functional as F

from .depth_metric import maps_of


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
