"""A fixed sample of the readable images of a source, for evaluation."""

import copy

import numpy as np
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from dinov3_mm.datasets.images import BrokenImageError


@DATASETS.register_module()
class ReadableSubset:
    """Up to ``length`` images spread evenly over another source, unreadable ones left out.

    Training replaces an unreadable image; an evaluation must not see one twice instead. Every image
    of the sample is loaded once here, so that the set is final before the first evaluation.

    Args:
        source (dict): Config of the source.
        length (int): Largest number of images.

    Attributes:
        classes (tuple[str, ...]): Those of the source.

    Raises:
        ValueError: If ``length < 1`` or fewer than two images can be read.
    """

    def __init__(self, source: dict, length: int = 1000) -> None:
        if length < 1:
            raise ValueError(f"ReadableSubset needs length >= 1, got {length}")
        self.source = DATASETS.build(copy.deepcopy(dict(source)))
        self.classes = tuple(getattr(self.source, "classes", None) or ())
        number = min(length, len(self.source))
        candidates = np.linspace(0, len(self.source) - 1, number).round().astype(int).tolist()
        self.indices = [index for index in candidates if self._is_readable(index)]
        if len(self.indices) < 2:
            raise ValueError(
                f"an evaluation needs two readable images, {len(self.indices)} of "
                f"{number} could be read"
            )
        if len(self.indices) < number:
            print_log(
                f"evaluation leaves out {number - len(self.indices)} of {number} images that "
                "cannot be read",
                logger="current",
            )

    def _is_readable(self, index: int) -> bool:
        try:
            self.source.load_image(index)
        except BrokenImageError:
            return False
        return True

    def __len__(self) -> int:
        return len(self.indices)

    def load_image(self, index: int) -> np.ndarray:
        """``(H, W, C)`` uint8 image."""
        return self.source.load_image(self.indices[index])

    def path(self, index: int) -> str:
        """Where the image comes from."""
        return self.source.path(self.indices[index])

    def label(self, index: int) -> int:
        """Class index, if the source has labels."""
        return self.source.label(self.indices[index])
