"""From an image in any form to the tensor that a backbone sees."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from dinov3_mm.datasets.images import BrokenImageError, pil_pixels
from dinov3_mm.datasets.loader import init_worker
from dinov3_mm.datasets.sources import FileSource, ImageSource
from dinov3_mm.errors import hint

NATIVE = "native"
RESIZE_MODES = ("squash", "short_side_crop")
NATIVE_MODES = ("crop", "pad")
INTERPOLATIONS = ("bilinear", "bicubic")

ImageLike = str | os.PathLike | Image.Image | np.ndarray | Tensor


class UnsuitableImageError(ValueError):
    """An image that was read, but cannot become an input: wrong channels, or too small."""


@dataclass(frozen=True)
class ImagePreparation:
    """Geometry of the input: (C, H, W) pixels in 0..255 to (C, h, w) in the same dtype.

    Attributes:
        channels: channels that the backbone takes.
        stride: pixels per patch side; h and w are multiples of it.
        size: (h, w) of the result, or None to keep the size of the image.
        resize: with a size 'squash' (both sides to the size, whatever the aspect ratio; the
            reference preprocessing) or 'short_side_crop' (scaled until it covers the size, then cut
            around the centre). Without a size 'crop' (the remainder at the right and at the bottom
            is cut off, as the backbone itself would do) or 'pad' (the last row and column are
            repeated up to the next multiple).
        interpolation: 'bilinear' or 'bicubic', with antialiasing; uint8 stays uint8.
    """

    channels: int
    stride: int
    size: tuple[int, int] | None
    resize: str
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        modes = NATIVE_MODES if self.size is None else RESIZE_MODES
        if self.resize not in modes:
            kind = "image_size='native'" if self.size is None else "a fixed image_size"
            raise ValueError(f"resize is {self.resize!r}; {kind} goes with {' or '.join(modes)}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"unknown interpolation {self.interpolation!r}; "
                f"{hint(str(self.interpolation), INTERPOLATIONS)}"
            )
        for side in self.size or ():
            check_multiple("image_size", side, self.stride)

    def __call__(self, image: Tensor) -> Tensor:
        """Prepare one image.

        Raises:
            UnsuitableImageError: If it has other channels, or is smaller than a patch where its
                size is kept.
        """
        if image.shape[0] != self.channels:
            raise UnsuitableImageError(
                f"an image has {image.shape[0]} channel(s), the backbone takes {self.channels}"
            )
        if self.size is None:
            return self._native(image)
        height, width = self.size
        if self.resize == "short_side_crop":
            scale = max(height / image.shape[1], width / image.shape[2])
            covering = [
                max(side, round(length * scale)) for side, length in zip(self.size, image.shape[1:])
            ]
            return TF.center_crop(self._resize(image, covering), [height, width])
        return self._resize(image, [height, width])

    def _resize(self, image: Tensor, size: list[int]) -> Tensor:
        if list(image.shape[1:]) == size:
            return image
        mode = InterpolationMode(self.interpolation)
        return TF.resize(image, size, interpolation=mode, antialias=True)

    def _native(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        if self.resize == "pad":
            padding = [0, 0, -width % self.stride, -height % self.stride]
            return TF.pad(image, padding, padding_mode="edge") if any(padding) else image
        if min(height, width) < self.stride:
            raise UnsuitableImageError(
                f"an image of {height}x{width} pixels is smaller than one patch of {self.stride}; "
                "pad it (resize='pad') or give an image_size"
            )
        return image[:, : height // self.stride * self.stride, : width // self.stride * self.stride]


def parse_image_size(
    image_size: int | tuple[int, int] | str | None, stride: int
) -> tuple[int, int] | None:
    """(h, w) of an ``image_size`` argument, None for 'native'.

    None means sixteen patches a side: 256 for patches of 16 pixels, 224 for 14. Larger strides, of
    which 256 is a multiple, also get 256.

    Raises:
        ValueError: If it is neither a side, a pair of sides, nor 'native'.
    """
    if image_size is None:
        side = 256 if 256 % stride == 0 else 16 * stride
        return side, side
    if image_size == NATIVE:
        return None
    pair = (image_size, image_size) if isinstance(image_size, int) else image_size
    sides = tuple(pair) if isinstance(pair, (tuple, list)) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(
            f"image_size is {image_size!r}; expected a side in pixels, a pair (height, width) or "
            "'native'"
        )
    return sides


def check_multiple(name: str, value: int, stride: int) -> None:
    """Raise ValueError with the neighbouring multiples if ``value`` is no multiple of a patch."""
    if value % stride:
        lower = value // stride * stride
        choices = [str(side) for side in (lower, lower + stride) if side]
        raise ValueError(
            f"{name} {value} is not a multiple of the patch size {stride}; "
            f"use {' or '.join(choices)}"
        )


def load_pixels(image: ImageLike, read: Callable[[str], np.ndarray]) -> Tensor:
    """Pixels (C, H, W) of a path, PIL image, array (H, W, C) or tensor (C, H, W), in 0..255.

    Args:
        image: the image. Arrays and tensors are uint8, or floating point in the 0..255 scale; PIL
            images are turned and converted as files are, see :mod:`dinov3_mm.datasets.images`.
        read: decodes the file at a path to an array (H, W, C).

    Raises:
        BrokenImageError: If a file cannot be decoded.
        FileNotFoundError: If there is no such file.
        TypeError: If the image is of another kind.
        ValueError: If it has another shape, or is not in the 0..255 scale; also a PIL image of
            32-bit pixels.
    """
    if isinstance(image, (str, os.PathLike)):
        return from_array(read(_existing(image)))
    if isinstance(image, Image.Image):
        return from_array(pil_pixels(image))
    if isinstance(image, np.ndarray):
        pixels = from_array(image)
    elif isinstance(image, Tensor):
        pixels = image.detach().cpu()
    else:
        raise TypeError(
            f"an image is a {type(image).__name__}; expected a path, a PIL image, an array "
            "(H, W, C) or a tensor (C, H, W)"
        )
    return _checked(pixels)


def from_array(array: np.ndarray) -> Tensor:
    """(H, W) or (H, W, C) array to a (C, H, W) tensor; no copy where the memory allows it."""
    array = array[..., None] if array.ndim == 2 else array
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    # The resize of torchvision is twice as fast on pixels whose channels lie together.
    return torch.from_numpy(array).permute(2, 0, 1) if array.ndim == 3 else torch.from_numpy(array)


def _existing(path: str | os.PathLike) -> str:
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; pass its files, or extract folders with tools/extract_features.py"
        )
    if not path.exists():
        raise FileNotFoundError(f"no image at {path}")
    return str(path)


def _checked(pixels: Tensor) -> Tensor:
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise ValueError(
            f"an image has shape {tuple(pixels.shape)}; expected an array (H, W, C) or a tensor "
            "(C, H, W), or a list of them"
        )
    if pixels.dtype == torch.uint8:
        return pixels
    if not pixels.is_floating_point():
        raise TypeError(
            f"an image has dtype {pixels.dtype}; expected uint8, or floating point in 0..255"
        )
    low, high = pixels.min().item(), pixels.max().item()
    if not 0 <= low <= high <= 255 or 0 < high <= 1:
        raise ValueError(
            f"a floating-point image spans [{low:.3g}, {high:.3g}]; expected the 0..255 scale of "
            "pixels, not normalised: multiply images in 0..1 by 255"
        )
    return pixels.float()


# --- Batches, decoded and resized in worker processes ---


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
