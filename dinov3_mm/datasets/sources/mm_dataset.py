"""The images of any OpenMMLab dataset."""

import numpy as np
from mmengine import fileio
from mmengine.registry import DATASETS

from dinov3_mm.datasets.sources.decode import BrokenImageError, check_color, decode_image


@DATASETS.register_module()
class MMDatasetSource:
    """Reads the ``img_path`` of every sample of a dataset built from the DATASETS registry.

    The dataset's own pipeline is not run. Paths may have any prefix that MMEngine's file backends
    know.

    Args:
        dataset (dict | object): Config of the dataset, or the dataset itself, with
            ``get_data_info(index)`` as MMEngine's ``BaseDataset`` has it.
        color (str): ``'rgb'`` or ``'gray'`` (one channel).
        backend_args (dict | None): Passed on to :func:`mmengine.fileio.get`.

    Raises:
        TypeError: If the dataset has no ``get_data_info``.
        ValueError: If it is empty or its samples have no ``img_path``.
    """

    def __init__(
        self, dataset: dict | object, *, color: str = "rgb", backend_args: dict | None = None
    ) -> None:
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self.color = check_color(color)
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
        """``(H, W, 3)`` or ``(H, W, 1)`` uint8 image; BrokenImageError if it cannot be read."""
        path = self.path(index)
        try:
            data = fileio.get(path, backend_args=self.backend_args)
        except OSError as error:
            raise BrokenImageError(path, error.strerror or str(error)) from error
        return decode_image(data, path, self.color)

    def label(self, index: int) -> int:
        """``gt_label`` of a sample; ValueError if it has none."""
        info = self.dataset.get_data_info(index)
        if "gt_label" not in info:
            raise ValueError(f"sample {index} of {type(self.dataset).__name__} has no 'gt_label'")
        return int(np.asarray(info["gt_label"]).reshape(-1)[0])
