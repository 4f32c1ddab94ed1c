"""Images that evaluations look at: kept from training, in one geometry, with their labels."""

import copy
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from .class_names import ClassNameError, classes_of, map_classes
from .sources import FileSource

IGNORE_INDEX = 255


# --- Images that are kept from training ---


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


# --- Images and labels of a source in one geometry ---


class ImageSource(Protocol):
    """What evaluation needs of a data set; labelled ones add ``label(i)``/``semantic_mask(i)``."""

    def __len__(self) -> int: ...

    def load_image(self, index: int) -> np.ndarray:
        """Image (H, W, C), uint8 or float32 in 0..255; RGB for three channels."""
        ...


class CachedImages(Dataset, ABC):
    """(C, S, S) tensors by index, kept in memory after the first reading if asked to.

    Like the source's images they are uint8, or float32 in 0..255.

    Subclasses define ``read(index)``. The cache fills in the process that loads: it serves loaders
    with ``num_workers=0``.
    """

    def __init__(self, source: ImageSource, cache: bool) -> None:
        if not len(source):
            raise ValueError(f"{type(source).__name__} holds no images: nothing to evaluate")
        self.source = source
        self._cache: dict[int, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        if self._cache is None:
            return self.read(index)
        if index not in self._cache:
            self._cache[index] = self.read(index)
        return self._cache[index]

    @abstractmethod
    def read(self, index: int) -> Tensor:
        """Load and transform one image: (C, S, S)."""


class ImageSet(CachedImages):
    """Square evaluation inputs of a source: (C, S, S) uint8 or float32 tensors by index.

    The short side is resized to ``resize_size`` (bicubic, antialiased) and the centre
    ``image_size`` x ``image_size`` is cut out. ``resize_size`` defaults to ``image_size``, which
    keeps the whole short side; the ImageNet protocol of the DINO papers is 224 out of 256.

    Args:
        source: images by ``load_image(i)``.
        image_size: side S of the result.
        resize_size: length of the short side before the crop, at least ``image_size``.
        cache: keep the inputs (C * S * S bytes each, four times that for float32), for sets that
            are read many times.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        resize_size: int | None = None,
        *,
        cache: bool = False,
    ) -> None:
        super().__init__(source, cache)
        self.image_size = int(image_size)
        self.resize_size = int(resize_size or image_size)
        if not 0 < self.image_size <= self.resize_size:
            raise ValueError(
                f"image_size {image_size} must be positive and at most resize_size {resize_size}"
            )

    def read(self, index: int) -> Tensor:
        """Image (C, S, S), uint8 or float32 in 0..255."""
        image = self._square(to_chw(self.source.load_image(index)), InterpolationMode.BICUBIC)
        return image.clamp_(0, 255) if image.is_floating_point() else image

    def mask(self, index: int) -> Tensor:
        """Semantic labels (S, S) int64 in the geometry of the image (nearest neighbour)."""
        mask = torch.from_numpy(np.asarray(self.source.semantic_mask(index), dtype=np.int64))
        return self._square(mask[None], InterpolationMode.NEAREST_EXACT)[0]

    def _square(self, image: Tensor, interpolation: InterpolationMode) -> Tensor:
        if min(image.shape[-2:]) != self.resize_size:
            image = TF.resize(image, [self.resize_size], interpolation=interpolation)
        return TF.center_crop(image, [self.image_size, self.image_size]).contiguous()


def to_chw(image: np.ndarray) -> Tensor:
    """(H, W, C) array, uint8 or float32 in 0..255, to a (C, H, W) tensor of the same type.

    Raises:
        TypeError: if the array is no such image.
    """
    if image.dtype not in (np.uint8, np.float32) or image.ndim != 3:
        raise TypeError(
            "expected an (H, W, C) uint8 image, or float32 in 0..255 (sources with "
            f"color='unchanged' map their values to it), got {image.shape} {image.dtype}"
        )
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def class_labels(source: ImageSource) -> Tensor:
    """Class index of every image of a labelled source, (N,) int64.

    Raises:
        TypeError: if the source has no ``label(i)``.
        ValueError: if a label is negative (an unlabelled image).
    """
    if not hasattr(source, "label"):
        raise TypeError(
            f"{type(source).__name__} has no label(i): class evaluation needs a labelled source; "
            "for unlabelled images use two-crop retrieval"
        )
    labels = [source.label(index) for index in range(len(source))]
    unlabelled = next((i for i, label in enumerate(labels) if label is None or label < 0), None)
    if unlabelled is not None:
        raise ValueError(
            f"image {unlabelled} of {type(source).__name__} has label {labels[unlabelled]}: "
            "class evaluation needs a class index >= 0 for every image"
        )
    return torch.tensor(labels, dtype=torch.int64)


def paired_labels(train: ImageSource, test: ImageSource) -> tuple[Tensor, Tensor]:
    """Classes of two labelled sources under one numbering, by name: (N,) and (M,) int64.

    The numbers are those of ``train``; where neither source has ``classes``, those of each. What
    differs without harm is logged.

    Raises:
        TypeError, ValueError: see :func:`class_labels`.
        ClassNameError: test images of a class that training does not have; or one source names its
            classes and the other does not.
    """
    labels, test_labels = class_labels(train), class_labels(test)
    names, test_names = classes_of(train), classes_of(test)
    if bool(names) != bool(test_names):
        kinds = [type(source).__name__ for source in (train, test)]
        named, bare = kinds if names else kinds[::-1]
        raise ClassNameError(
            f"the {named} names its classes ({', '.join((names or test_names)[:5])}, ...) and the "
            f"{bare} has numbers only: they cannot be matched; give it the names as 'classes' too "
            "(metainfo.classes of an MM dataset)"
        )
    if not names:
        return labels, test_labels
    counts = torch.bincount(test_labels, minlength=len(test_names)).tolist()
    where = _named(test, "the test set")
    numbers, lines = map_classes(
        names, test_names, owner=_named(train, "the training set"), where=where, counts=counts
    )
    filled = torch.bincount(labels, minlength=len(names)) > 0
    lost = {
        f"{name!r}": count
        for name, number, count in zip(test_names, numbers, counts)
        if count and not filled[number]
    }
    if lost:
        listed = ", ".join(f"{name} ({count} images)" for name, count in list(lost.items())[:5])
        if isinstance(train, FileSource):
            raise ClassNameError(
                f"{_named(train, 'the training set')} has no image of {listed} of {where}: none of "
                "these can be classed right; add training images, or take them out"
            )
        lines.append(
            f"WARNING: {sum(lost.values())} of {len(test_labels)} test images are of {len(lost)} "
            f"classes without a training image ({listed}) and count as wrong; take more images"
        )
    for line in lines:
        print_log(line, logger="current")
    return labels, torch.tensor(numbers, dtype=torch.int64)[test_labels]


def _named(source: ImageSource, role: str) -> str:
    root = getattr(source, "root", None)
    return f"{role} ({root})" if root else role


def check_semantic_classes(train: ImageSource, test: ImageSource) -> int:
    """Number of semantic classes of two sources with masks.

    Raises:
        ClassNameError: the two state different numbers or names (``semantic_classes``).
    """
    numbers = [source.num_semantic_classes for source in (train, test)]
    names = [tuple(getattr(source, "semantic_classes", None) or ()) for source in (train, test)]
    if numbers[0] != numbers[1] or (all(names) and names[0] != names[1]):
        raise ClassNameError(
            f"the training source has {numbers[0]} semantic classes ({', '.join(names[0][:5])}), "
            f"the test source {numbers[1]} ({', '.join(names[1][:5])}); masks of both must have "
            "the same classes in the same order"
        )
    return numbers[0]


def patch_labels(
    masks: Tensor, patch_size: int, num_classes: int, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Majority label of every patch: masks (N, S, S) int64 -> (N, S/p, S/p) int64.

    Ignored pixels do not vote; a patch with more than half of its pixels ignored is ignored. Ties
    go to the lower class index.

    Raises:
        ValueError: if S is no multiple of the patch size or a label is out of range.
    """
    num, height, width = masks.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"mask size {height}x{width} is no multiple of patch size {patch_size}")
    ignored = masks == ignore_index
    valid = masks[~ignored]
    if valid.numel() and not (valid.min() >= 0 and valid.max() < num_classes):
        raise ValueError(
            f"mask labels span [{valid.min()}, {valid.max()}], expected [0, {num_classes - 1}] or "
            f"the ignore index {ignore_index}"
        )
    rows, columns, area = height // patch_size, width // patch_size, patch_size**2
    pixels = masks.masked_fill(ignored, num_classes)  # one more bin for the ignored ones
    pixels = pixels.view(num, rows, patch_size, columns, patch_size)
    pixels = pixels.transpose(2, 3).reshape(-1, area)  # (patches, pixels)
    counts = pixels.new_zeros(len(pixels), num_classes + 1)
    counts.scatter_add_(1, pixels, torch.ones_like(pixels))
    labels = counts[:, :num_classes].argmax(dim=1)
    labels[2 * counts[:, num_classes] > area] = ignore_index
    return labels.view(num, rows, columns)
