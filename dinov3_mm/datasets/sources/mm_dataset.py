"""The images of any OpenMMLab dataset."""

from collections.abc import Sequence

import numpy as np
from mmengine import fileio
from mmengine.registry import DATASETS

from dinov3_mm.datasets.images import BrokenImageError
from dinov3_mm.datasets.multiband import PixelFormat


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
