"""Large images as overlapping tiles: an approximation whose memory does not grow with the image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .preparation import check_multiple

Position = tuple[int, int]  # top and left pixel of a tile


class Tiling:
    """Overlapping tiles of one side length.

    Tokens of a tile see nothing beyond it, so features are not those of the whole image.

    Args:
        tile: side of a tile in pixels; images that are smaller along an axis are not cut there.
        overlap: pixels that neighbours share at least; None: an eighth of the tile.
        stride: pixels per patch side; both are multiples of it.

    Raises:
        ValueError: If the sizes are no multiples, or the overlap is not smaller than the tile.
    """

    def __init__(self, tile: int, overlap: int | None, stride: int) -> None:
        check_multiple("tile", tile, stride)
        overlap = tile // 8 // stride * stride if overlap is None else overlap
        check_multiple("overlap", overlap, stride)
        if not 0 <= overlap < tile:
            raise ValueError(f"overlap is {overlap}; expected 0 or more and less than tile {tile}")
        self.tile, self.overlap = tile, overlap

    def applies_to(self, height: int, width: int) -> bool:
        """Whether an image of this size is cut."""
        return max(height, width) > self.tile

    def positions(self, height: int, width: int) -> list[Position]:
        """Top left pixels of the tiles, row by row; the last ones end with the image."""
        return [(y, x) for y in self._starts(height) for x in self._starts(width)]

    def cut(self, image: Tensor) -> Tensor:
        """Tiles (T, C, h, w) of an image (C, H, W)."""
        height, width = image.shape[1:]
        return torch.stack(
            [
                image[:, y : y + self.tile, x : x + self.tile]
                for y, x in self.positions(height, width)
            ]
        )

    def stitch(self, maps: Tensor, height: int, width: int) -> Tensor:
        """Maps (T, D, h, w) of the tiles to one map of the image; shared places are averaged."""
        tile_height = min(height, self.tile)
        pixels = tile_height // maps.shape[2]  # per place of the map
        rows, columns = height // pixels, width // pixels
        total = maps.new_zeros(maps.shape[1], rows, columns)
        count = maps.new_zeros(rows, columns)
        for tile, (y, x) in zip(maps, self.positions(height, width)):
            window = (
                slice(y // pixels, y // pixels + tile.shape[1]),
                slice(x // pixels, x // pixels + tile.shape[2]),
            )
            total[(slice(None), *window)] += tile
            count[window] += 1
        return total / count

    def _starts(self, length: int) -> Sequence[int]:
        if length <= self.tile:
            return (0,)
        last = length - self.tile
        return (*range(0, last, self.tile - self.overlap), last)
