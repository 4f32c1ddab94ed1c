"""What an extractor returns: the tokens of images, of the last block and of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
