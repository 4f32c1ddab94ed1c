"""Which positions of a map are padding."""

from collections.abc import Sequence

import torch
from torch import Tensor


def padding_mask(
    shapes: Sequence[tuple[int, ...]] | None,
    grid: tuple[int, int],
    stride: int,
    device: torch.device,
) -> Tensor | None:
    """True where a position holds no pixel of its image.

    Args:
        shapes: height and width of each image in pixels, its top left corner at that of the map;
            None for images that fill it.
        grid: rows and columns of the map.
        stride: pixels from one position to the next.
        device: of the mask.

    Returns:
        bool (B, rows, columns), or None if all images fill the map.
    """
    if shapes is None:
        return None
    valid = [tuple(-(-side // stride) for side in shape[:2]) for shape in shapes]
    if all(sides == tuple(grid) for sides in valid):
        return None
    mask = torch.ones(len(valid), *grid, dtype=torch.bool)
    for image, (rows, columns) in zip(mask, valid):
        image[:rows, :columns] = False
    return mask.to(device, non_blocking=True)
