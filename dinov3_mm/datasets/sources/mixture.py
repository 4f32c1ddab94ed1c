"""Sources over other data: mixtures of sources, and data sets of OpenMMLab."""

import copy
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from mmengine import fileio
from mmengine.registry import DATASETS

from dinov3_mm.datasets.images import BrokenImageError
from dinov3_mm.datasets.multiband import PixelFormat
from dinov3_mm.datasets.order import EpochOrder, Interleaving, Order

from .files import ImageSource

# --- Mixtures ---


class _Mixture:
    """Parts behind one index, part after part.

    Args:
        parts: sources or their configs.
        ratios: share of each part among samples or batches.
    """

    def __init__(self, parts: Sequence[dict | ImageSource], ratios: Sequence[float]) -> None:
        if not parts or len(parts) != len(ratios):
            raise ValueError(
                f"{type(self).__name__} needs one ratio per part, got {len(parts)} parts and "
                f"{len(ratios)} ratios"
            )
        self.parts = [
            DATASETS.build(copy.deepcopy(dict(part))) if isinstance(part, dict) else part
            for part in parts
        ]
        self.ratios = list(ratios)
        Interleaving(self.ratios, seed=0)  # bad ratios show at once
        self._starts = [0, *accumulate(len(part) for part in self.parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def _find(self, index: int) -> tuple[ImageSource, int]:
        """The part that holds an index, and the index in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside {len(self)} images")
        part = bisect_right(self._starts, index) - 1
        return self.parts[part], index - self._starts[part]

    def load_image(self, index: int) -> np.ndarray:
        """Image of the part that holds the index."""
        part, inner = self._find(index)
        return part.load_image(inner)

    def path(self, index: int) -> str:
        """Name of the image for messages."""
        part, inner = self._find(index)
        return part.path(inner)

    def _orders(self, seed: int, global_batch_size: int) -> list[Order]:
        # Odd multiples keep the parts' seeds apart from each other and from the run's own.
        return [
            order_of(part, seed + (2 * index + 1) * 1_000_003, global_batch_size)
            for index, part in enumerate(self.parts)
        ]


@DATASETS.register_module()
class WeightedConcat(_Mixture):
    """Samples of several sources side by side in every batch, by ratio.

    Each source is passed through epoch by epoch in orders of its own, whatever its share, so none
    of its images comes twice before each came once. Order and shares are functions of the sample
    position: nothing is counted, and a run resumes anywhere.

    Args:
        parts (list[dict | ImageSource]): Sources or their configs.
        ratios (list[float]): Share of each among the samples.

    Raises:
        ValueError: If the ratios do not fit the parts.
    """

    def order(self, seed: int, global_batch_size: int) -> Order:
        """Order of the samples of a run; see :mod:`dinov3_mm.datasets.order`."""
        interleaving = Interleaving(self.ratios, seed)
        orders = self._orders(seed, global_batch_size)

        def index_of(position: int) -> int:
            part, ordinal = interleaving(position)
            return self._starts[part] + orders[part](ordinal)

        return index_of


@DATASETS.register_module()
class BatchMixture(_Mixture):
    """Whole global batches from one of several sources, by ratio (arXiv 2508.10104 section 3.1).

    The paper draws a tenth of its batches from ImageNet-1k alone and the others from a mixture of
    everything else: ``BatchMixture(parts=[IMAGENET, dict(type='WeightedConcat', ...)],
    ratios=[0.1, 0.9])``. All ranks make the same choice.

    Args:
        parts (list[dict | ImageSource]): Sources or their configs.
        ratios (list[float]): Share of each among the batches.

    Raises:
        ValueError: If the ratios do not fit the parts.
    """

    def order(self, seed: int, global_batch_size: int) -> Order:
        """Order of the samples of a run; see :mod:`dinov3_mm.datasets.order`."""
        interleaving = Interleaving(self.ratios, seed)
        orders = self._orders(seed, global_batch_size)

        def index_of(position: int) -> int:
            iteration, inner = divmod(position, global_batch_size)
            part, ordinal = interleaving(iteration)
            return self._starts[part] + orders[part](ordinal * global_batch_size + inner)

        return index_of


def order_of(source: ImageSource, seed: int, global_batch_size: int) -> Order:
    """The order that a source states, else epochs."""
    if hasattr(source, "order"):
        return source.order(seed, global_batch_size)
    return EpochOrder(len(source), seed)


# --- Data sets of OpenMMLab ---


@DATASETS.register_module()
class MMDatasetSource:
    """Reads the ``img_path`` of every sample of a dataset built from the DATASETS registry.

    The dataset's own pipeline is not run. Paths may have any prefix that MMEngine's file backends
    know.

    Args:
        dataset (dict | object): Config of the dataset, or the dataset itself, with
            ``get_data_info(index)`` as MMEngine's ``BaseDataset`` has it.
        color (str): ``'rgb'``, ``'gray'`` or ``'unchanged'``, see
            :class:`~dinov3_mm.datasets.sources.ImageFolder`.
        channels (Sequence[int] | None): See there.
        value_range (tuple[float, float] | None): See there.
        backend_args (dict | None): Passed on to :func:`mmengine.fileio.get`.

    Raises:
        TypeError: If the dataset has no ``get_data_info``.
        ValueError: If it is empty or its samples have no ``img_path``.
    """

    def __init__(
        self,
        dataset: dict | object,
        *,
        color: str = "rgb",
        channels: Sequence[int] | None = None,
        value_range: tuple[float, float] | None = None,
        backend_args: dict | None = None,
    ) -> None:
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self.format = PixelFormat(color, channels=channels, value_range=value_range)
        self.backend_args = backend_args
        name = type(self.dataset).__name__
        if not hasattr(self.dataset, "get_data_info"):
            raise TypeError(
                f"{name} has no get_data_info(index); wrap a dataset of MMEngine's kind"
            )
        if not len(self.dataset):
            raise ValueError(f"{name} holds no samples")
        info = self.dataset.get_data_info(0)
        if "img_path" not in info:
            raise ValueError(f"the samples of {name} have no 'img_path', only {sorted(info)}")

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the dataset; empty if it has none."""
        return tuple(getattr(self.dataset, "metainfo", {}).get("classes") or ())

    def __len__(self) -> int:
        return len(self.dataset)

    def path(self, index: int) -> str:
        """Path of an image."""
        return self.dataset.get_data_info(index)["img_path"]

    def load_image(self, index: int) -> np.ndarray:
        """``(H, W, C)`` uint8, or float32 in 0..255; BrokenImageError if it cannot be read."""
        path = self.path(index)
        try:
            data = fileio.get(path, backend_args=self.backend_args)
        except OSError as error:
            raise BrokenImageError(path, error.strerror or str(error)) from error
        return self.format.decode(data, path)

    def label(self, index: int) -> int:
        """``gt_label`` of a sample; ValueError if it has none."""
        info = self.dataset.get_data_info(index)
        if "gt_label" not in info:
            raise ValueError(f"sample {index} of {type(self.dataset).__name__} has no 'gt_label'")
        return int(np.asarray(info["gt_label"]).reshape(-1)[0])
