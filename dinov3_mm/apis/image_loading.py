"""Images of a source as prepared batches, decoded and resized in worker processes."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov3_mm.datasets.loader import init_worker
from dinov3_mm.datasets.sources import BrokenImageError, FileSource, ImageSource

from .preparation import (
    ImageLike,
    ImagePreparation,
    UnsuitableImageError,
    from_array,
    load_pixels,
)


class ImageFiles(FileSource):
    """Image files named one by one.

    Args:
        paths: the files.
        **options: see :class:`FileSource`.
    """

    def __init__(self, paths: Sequence[str], **options) -> None:
        super().__init__("", **options)
        for path in paths:
            self._paths.append(path)


class LoadedBatch(NamedTuple):
    """What a loader gives for a list of indices.

    Attributes:
        groups: (indices, pixels (B, C, h, w)) for each size among the images.
        left_out: index and reason of every image that could not be used.
    """

    groups: list[tuple[tuple[int, ...], Tensor]]
    left_out: list[tuple[int, str]]


class SourcePixels:
    """Pixels (C, H, W) of a source by index."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __call__(self, index: int) -> Tensor:
        return from_array(self.source.load_image(index))


class GivenPixels:
    """Pixels (C, H, W) of images in any form by index; see :func:`load_pixels`."""

    def __init__(self, images: Sequence[ImageLike], read: Callable[[str], np.ndarray]) -> None:
        self.images, self.read = images, read

    def __call__(self, index: int) -> Tensor:
        return load_pixels(self.images[index], self.read)


def load_batches(
    load: Callable[[int], Tensor],
    batches: Sequence[Sequence[int]],
    preparation: ImagePreparation,
    *,
    num_workers: int,
    pin_memory: bool = False,
) -> Iterator[LoadedBatch]:
    """Prepared images for lists of indices, in their order.

    Args:
        load: pixels (C, H, W) by index.
        batches: indices of each batch.
        preparation: geometry of the inputs.
        num_workers: processes that load; 0 loads in this one.
        pin_memory: for copies to a CUDA device.
    """
    loader = DataLoader(
        _PreparedImages(load, preparation),
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=init_worker,
        generator=torch.Generator(),  # else the loader draws its seed from the global generator
    )
    return iter(loader)


class _PreparedImages(Dataset):
    def __init__(self, load: Callable[[int], Tensor], preparation: ImagePreparation) -> None:
        self.load, self.preparation = load, preparation

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.preparation(self.load(index))
        except BrokenImageError as error:
            return index, error.reason
        except UnsuitableImageError as error:
            return index, str(error)


def _collate(samples: list[tuple[int, Tensor | str]]) -> LoadedBatch:
    sizes: dict[tuple, list[tuple[int, Tensor]]] = {}
    left_out = []
    for index, image in samples:
        if isinstance(image, str):
            left_out.append((index, image))
        else:
            sizes.setdefault((image.shape, image.dtype), []).append((index, image))
    groups = [
        (tuple(index for index, _ in group), torch.stack([image for _, image in group]))
        for group in sizes.values()
    ]
    return LoadedBatch(groups, left_out)
