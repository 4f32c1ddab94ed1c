"""Images of a source as prepared batches, decoded and resized in worker processes."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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

# Images of rare sizes wait for others of their size, until they would fill as many batches.
_WAITING_BATCHES = 4


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


def group_by_size(
    images: Iterable[tuple[int, Tensor]], capacity: Callable[[int, int], int]
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Batches of images of equal size, as (keys, pixels (B, C, h, w)).

    A batch is given out when it holds ``capacity(height, width)`` images, or when the images of
    other sizes that wait would together fill four batches.
    """
    waiting: dict[torch.Size, list[tuple[int, Tensor]]] = {}

    def filled(shape: torch.Size) -> float:
        return len(waiting[shape]) / capacity(*shape[1:])

    for key, image in images:
        waiting.setdefault(image.shape, []).append((key, image))
        if filled(image.shape) >= 1:
            yield _stacked(waiting.pop(image.shape))
        elif sum(map(filled, waiting)) >= _WAITING_BATCHES:
            yield _stacked(waiting.pop(max(waiting, key=filled)))
    for group in waiting.values():
        yield _stacked(group)


def all_usable(
    loaded: Iterable[LoadedBatch], images: Sequence[ImageLike]
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """The groups of loaded batches; BrokenImageError for the first image that was left out."""
    for groups, left_out in loaded:
        for index, reason in left_out:
            is_file = isinstance(images[index], (str, os.PathLike))
            raise BrokenImageError(str(images[index]) if is_file else f"image {index}", reason)
        yield from groups


def _stacked(group: list[tuple[int, Tensor]]) -> tuple[tuple[int, ...], Tensor]:
    keys, images = zip(*group)
    dtype = torch.uint8 if all(i.dtype == torch.uint8 for i in images) else torch.float32
    return keys, torch.stack([image.to(dtype) for image in images])


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
