"""Images that are kept from training, so that an evaluation says something about new ones."""

import copy
import hashlib
import os
from collections.abc import Mapping

import numpy as np
from mmengine.registry import DATASETS

PARTS = ("train", "test")


@DATASETS.register_module()
class HeldOutSplit:
    """One part of a source that is split by the names of its images.

    An image is held out if the hash of its path below the source's root says so. The split is
    therefore the same in every process and run, and an image stays on its side when others come
    or go.

    Args:
        source (dict | ImageSource): A source, or its config.
        part (str): ``'train'``, or ``'test'`` for the held-out images.
        every (int): One image in ``every`` is held out, on average.

    Attributes:
        classes (tuple[str, ...]): Those of the source.

    Raises:
        ValueError: If ``part`` is unknown, ``every`` is below 2, or the part is empty.
    """

    def __init__(self, source: object, part: str, every: int = 10) -> None:
        if part not in PARTS:
            raise ValueError(f"part must be one of {PARTS}, got {part!r}")
        if not isinstance(every, int) or every < 2:
            raise ValueError(f"every must be an integer >= 2, got {every!r}")
        if isinstance(source, Mapping):
            source = DATASETS.build(copy.deepcopy(dict(source)))
        self.source = source
        self.classes = tuple(getattr(source, "classes", ()))
        held_out = np.fromiter(
            (_digest(self._name(index)) % every == 0 for index in range(len(source))), bool
        )
        self.indices = np.flatnonzero(held_out if part == "test" else ~held_out)
        if not len(self.indices):
            raise ValueError(
                f"the {part} part of {len(source)} image(s) is empty when 1 in {every} is held out;"
                " give more images or a smaller number"
            )
        if hasattr(source, "probe"):
            self.probe = self._probe

    def _name(self, index: int) -> str:
        """Path of an image below the source's root."""
        path, root = self.source.path(index), getattr(self.source, "root", None)
        return path if root is None else path.removeprefix(root).lstrip(os.sep)

    def __len__(self) -> int:
        return len(self.indices)

    def load_image(self, index: int) -> np.ndarray:
        """``(H, W, C)`` image."""
        return self.source.load_image(int(self.indices[index]))

    def path(self, index: int) -> str:
        """Where the image comes from."""
        return self.source.path(int(self.indices[index]))

    def label(self, index: int) -> int:
        """Class index, if the source has labels."""
        return self.source.label(int(self.indices[index]))

    def _probe(self, index: int) -> object:
        return self.source.probe(int(self.indices[index]))


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little")
