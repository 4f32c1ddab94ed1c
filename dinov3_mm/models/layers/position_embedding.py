"""Learned absolute position embedding of a square grid, resampled for other grids."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def resample_position_embedding(
    embedding: Tensor, grid: tuple[int, int], *, offset: float = 0.0, antialias: bool = False
) -> Tensor:
    """Bicubic resampling of a position embedding; at its own size it is returned as it is.

    Without an offset the grid is resampled to the wanted size. With one, each side is scaled by
    ``(wanted + offset) / side`` and the sampling points follow that factor, not the ratio of the
    sizes: the first DINOv2 models were trained and evaluated so, with 0.1.

    Args:
        embedding: (1, side * side, D), row by row.
        grid: rows and columns that are wanted.
        offset: see above.
        antialias: low-pass filter when a side shrinks.

    Returns:
        (1, rows * columns, D), in fp32 if it was resampled from a narrower type.

    Raises:
        ValueError: if the offset is so large that another size results.
    """
    side = math.isqrt(embedding.shape[1])
    if tuple(grid) == (side, side):
        return embedding
    wide = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
    image = wide.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if offset:
        target = {"scale_factor": tuple((length + offset) / side for length in grid)}
    else:
        target = {"size": tuple(grid)}
    resampled = F.interpolate(image, mode="bicubic", antialias=antialias, **target)
    if tuple(resampled.shape[2:]) != tuple(grid):
        raise ValueError(
            f"an offset of {offset} resamples the position embedding to "
            f"{tuple(resampled.shape[2:])} instead of {tuple(grid)}; expected 0 or about 0.1"
        )
    return resampled.flatten(2).transpose(1, 2)
