"""What an extractor returns and of which layers; large images as tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .preparation import check_multiple

# --- Which layers ---


FOUR_EVEN = "four_even"

Layers = int | Sequence[int] | str | None


def resolve_layers(layers: Layers, num_blocks: int) -> tuple[int, ...]:
    """Block indices, ascending.

    Args:
        layers: the last n blocks, block indices from 0, 'four_even', or None for none.
        num_blocks: blocks of the backbone.

    Raises:
        ValueError: If an index is negative, repeated or out of range.
    """
    if layers is None:
        return ()
    if layers == FOUR_EVEN:
        return four_even_blocks(num_blocks)
    if isinstance(layers, str):
        raise ValueError(f"layers is {layers!r}; expected a number, block indices or {FOUR_EVEN!r}")
    wanted = range(num_blocks - layers, num_blocks) if isinstance(layers, int) else layers
    wanted = tuple(sorted(wanted))
    if len(set(wanted)) < len(wanted) or set(wanted) - set(range(num_blocks)):
        raise ValueError(
            f"layers is {layers}; expected a number of blocks, or distinct block indices from 0 to "
            f"{num_blocks - 1}"
        )
    return wanted


def four_even_blocks(num_blocks: int) -> tuple[int, ...]:
    """The four evenly spaced blocks of the DINOv3 evaluations; all stages of a ConvNeXt.

    The 24 blocks of ViT-L are an exception that has been kept since DINOv2.

    Raises:
        ValueError: If there are fewer than four blocks.
    """
    if num_blocks < 4:
        raise ValueError(
            f"four evenly spaced blocks need at least 4, the backbone has {num_blocks}"
        )
    if num_blocks == 24:
        return 4, 11, 17, 23
    step = num_blocks // 4
    return tuple(step * part - 1 for part in range(1, 5))


# --- Tokens ---


Grid = tuple[int, int]  # rows and columns of patches

FIELDS = ("cls", "registers", "patches", "pooled")


@dataclass(frozen=True)
class Tokens:
    """Tokens of B images after one block.

    Attributes:
        cls: (B, D).
        registers: (B, R, D); R is 0 for backbones without registers.
        patches: (B, N, D), row by row; for images of different sizes a tuple of (N_i, D).
        grids: rows and columns of patches of each image, N = rows * columns.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor | tuple[Tensor, ...]
    grids: tuple[Grid, ...]

    def __len__(self) -> int:
        return len(self.cls)

    @property
    def pooled(self) -> Tensor:
        """Mean of the patch tokens, (B, D)."""
        if isinstance(self.patches, Tensor):
            return self.patches.mean(1)
        return torch.stack([patches.mean(0) for patches in self.patches])

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches of all images.

        Raises:
            ValueError: If they differ; then ``grids`` has them.
        """
        if len(set(self.grids)) != 1:
            raise ValueError(f"the images have different grids, {sorted(set(self.grids))}")
        return self.grids[0]

    @property
    def feature_maps(self) -> Tensor | tuple[Tensor, ...]:
        """Patch tokens as images, (B, D, h, w); a tuple of (D, h_i, w_i) for different sizes."""
        if isinstance(self.patches, Tensor):
            return self.patches.transpose(1, 2).unflatten(2, self.grid)
        return tuple(p.T.unflatten(1, grid) for p, grid in zip(self.patches, self.grids))


@dataclass(frozen=True)
class ImageFeatures(Tokens):
    """Tokens of B images after the last block, and after the blocks that were asked for.

    Attributes:
        layers: tokens by block index.
    """

    layers: Mapping[int, Tokens] = field(default_factory=dict)


def join_features(parts: Sequence[ImageFeatures], order: Sequence[int]) -> ImageFeatures:
    """One result of several, with its images in ``order`` (positions in the joined parts)."""
    layers = {
        index: Tokens(*_joined([part.layers[index] for part in parts], order))
        for index in parts[0].layers
    }
    return ImageFeatures(*_joined(parts, order), layers)


def _joined(parts: Sequence[Tokens], order: Sequence[int]) -> tuple:
    grids = [grid for part in parts for grid in part.grids]
    rows = torch.as_tensor(order)
    in_order = list(order) == list(range(len(grids)))

    def cat(tensors: list[Tensor]) -> Tensor:
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return joined if in_order else joined[rows]

    if len(set(grids)) == 1:
        patches = cat([part.patches for part in parts])
    else:
        images = [image for part in parts for image in part.patches]
        patches = tuple(images[index] for index in order)
    return (
        cat([part.cls for part in parts]),
        cat([part.registers for part in parts]),
        patches,
        tuple(grids[index] for index in order),
    )


# --- Tiles: an approximation whose memory does not grow with the image ---


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
