"""From an image to what a backbone takes: the preprocessing of the official examples."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from dinov3_mm.checkpoints.locate import Statistics, read_statistics
from dinov3_mm.models.backbones import ZOO, ZooRow

DEFAULT_SIZE = 256
RESIZES = ("squash", "crop", "none")


def make_transform(
    name_or_file: str | os.PathLike | Statistics,
    size: int | Sequence[int] | None = None,
    *,
    resize: str = "squash",
) -> v2.Compose:
    """Transform of an image for inference: resize, scale to [0, 1], normalise.

    The result takes a PIL image, an (H, W, 3) uint8 array or a (..., 3, H, W) uint8 tensor and
    gives a float32 tensor (..., 3, h, w). Resizing is bilinear with antialiasing, on 8-bit values.

    Args:
        name_or_file: whose statistics to use: a name of :func:`list_backbones` or of the official
            hub (which stands for its first data, the web images), a weight file, folder, URL or hub
            name (see :func:`read_statistics`), or the statistics themselves.
        size: side of the result, or (height, width); by default 256, and 224 for the DINOv2 models
            with their patches of 14 pixels.
        resize: 'squash' to that size whatever the aspect ratio, as in the official examples;
            'crop' the short side and cut out the centre; 'none' keeps the size of the image.

    Raises:
        FileNotFoundError: If there is no such name or file.
        ValueError: If the statistics are unknown, or the size does not fit ``resize``.

    Example:
        >>> transform = make_transform("dinov3_vitl16_sat493m", 256)
        >>> images = transform(image)[None]
    """
    row = next(
        (row for name, row in ZOO.items() if name_or_file in (name, row.official_name)), None
    )
    statistics = _statistics(name_or_file, row)
    if size is None and resize != "none":
        size = 224 if row is not None and row.backbone == "DINOv2ViT" else DEFAULT_SIZE
    if len(statistics.mean) != 3:
        raise ValueError(f"the weights take {len(statistics.mean)} channels; images have 3")
    return v2.Compose(
        [
            ToRGB(),
            *_resizing(size, resize),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(statistics.mean), list(statistics.std)),
        ]
    )


def _statistics(name_or_file: str | os.PathLike | Statistics, row: ZooRow | None) -> Statistics:
    if isinstance(name_or_file, Statistics):
        return name_or_file
    if row is not None:
        return Statistics(row.mean, row.std, row.data or "custom")
    return read_statistics(name_or_file)


def _resizing(size: int | Sequence[int] | None, resize: str) -> list[nn.Module]:
    if resize not in RESIZES:
        raise ValueError(f"resize is {resize!r}; expected one of {RESIZES}")
    if resize == "none":
        if size is not None:
            raise ValueError(f"resize='none' takes no size, got {size}")
        return []
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"size is {size}; expected a number of pixels or (height, width)")
    bilinear = {"interpolation": v2.InterpolationMode.BILINEAR, "antialias": True}
    if resize == "squash":
        return [v2.Resize(sides, **bilinear)]
    if sides[0] != sides[1]:
        raise ValueError(f"resize='crop' gives squares; size is {size}")
    return [v2.Resize(sides[0], **bilinear), v2.CenterCrop(sides)]


class ToRGB(nn.Module):
    """An image of any usual form as a uint8 tensor (..., 3, H, W); grey becomes RGB."""

    def forward(self, image: Any) -> Tensor:
        """Convert one image.

        Raises:
            TypeError: If it is no PIL image, 8-bit array or 8-bit tensor of three channels.
        """
        if isinstance(image, Image.Image):
            if image.mode.startswith(("I", "F")):
                raise TypeError(f"the image has mode {image.mode!r}; convert it to 8 bits first")
            image = np.asarray(image.convert("RGB"))
        if isinstance(image, np.ndarray) and image.ndim == 3:
            image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if (
            not isinstance(image, Tensor)
            or image.dtype != torch.uint8
            or image.shape[-3:-2] != (3,)
        ):
            given = f"{type(image).__name__} {getattr(image, 'dtype', '')} {_shape(image)}"
            raise TypeError(
                f"got {given.strip()}; expected a PIL image, an (H, W, 3) uint8 array or a "
                "(..., 3, H, W) uint8 tensor: statistics belong to 8-bit values over 255"
            )
        return image


def _shape(image: Any) -> str:
    return str(tuple(image.shape)) if hasattr(image, "shape") else ""
