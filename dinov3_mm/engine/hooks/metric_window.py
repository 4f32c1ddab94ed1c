"""Means of training metrics over a log interval, with one read from the device per interval."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from mmengine.dist import all_gather_object, all_reduce
from torch import Tensor


class MetricWindow:
    """Collects scalars as they come and averages them when asked.

    Adding keeps a reference and does no work on the device, so it neither waits for the GPU nor
    launches a kernel. A metric that appears only in some steps is averaged over those.

    Args:
        differs (bool): Processes may have different metrics; each is then averaged over those that
            have it.
    """

    def __init__(self, differs: bool = False) -> None:
        self._differs = differs
        self._tensors: dict[str, list[Tensor]] = defaultdict(list)
        self._numbers: dict[str, list[float]] = defaultdict(list)

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Take one step's metrics: scalar tensors or numbers."""
        for name, value in metrics.items():
            if isinstance(value, Tensor):
                self._tensors[name].append(value)
            else:
                self._numbers[name].append(float(value))

    def take(self) -> dict[str, float]:
        """Mean of each metric since the last call, tensors also over processes; starts anew.

        Every process must call it in the same step, with the same metrics unless they differ.
        """
        means = {name: sum(values) / len(values) for name, values in self._numbers.items()}
        if self._tensors:
            rows = [torch.stack(values).float().mean() for values in self._tensors.values()]
            device = rows[0].device
            stacked = torch.stack([row.to(device) for row in rows])
            if not self._differs:
                all_reduce(stacked, "mean")
            means.update(zip(self._tensors, stacked.tolist(), strict=True))
        self._tensors.clear()
        self._numbers.clear()
        return _mean_of_those_who_have(all_gather_object(means)) if self._differs else means


def _mean_of_those_who_have(parts: list[dict[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for part in parts:
        for name, value in part.items():
            values[name].append(value)
    return {name: sum(each) / len(each) for name, each in values.items()}
