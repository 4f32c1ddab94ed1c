"""Cosine similarity of one patch to all others: what dense features take for the same thing."""

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from matplotlib.patches import Rectangle
from torch import Tensor

from .figures import patch_grid, saved_figure, show_image

# Readable on photographs and on the map's dark blue to yellow.
QUERY_COLOURS = ("#FF3030", "#FF9EF0", "#FFFFFF", "#FF8C00")


def similarity_maps(patches: Tensor, queries: Sequence[tuple[int, int]]) -> Tensor:
    """Cosine of every patch with each query patch of the same image.

    Args:
        patches: (h, w, D) features of one image.
        queries: (row, column) of Q patches.

    Returns:
        (Q, h, w) in [-1, 1].

    Raises:
        IndexError: if a query lies outside the grid.
    """
    height, width = patches.shape[:2]
    for row, column in queries:
        if not (0 <= row < height and 0 <= column < width):
            raise IndexError(f"query ({row}, {column}) lies outside the {height}x{width} patches")
    unit = F.normalize(patches.float(), dim=-1)
    rows, columns = zip(*queries)
    return (unit @ unit[list(rows), list(columns)].T).permute(2, 0, 1)


def save_similarity_figure(
    path: str | Path,
    images: Sequence,
    patches: Tensor,
    queries: Sequence[Sequence[tuple[int, int]]],
) -> None:
    """PNG: one row per image, with its queries marked, and one similarity map per query.

    Args:
        path: file to write.
        images: N images, (3, S, S) or (S, S, 3) uint8.
        patches: (N, P, D) or (N, h, w, D) features.
        queries: for every image the (row, column) of its query patches, equally many.
    """
    grid = patch_grid(patches)
    counts = {len(points) for points in queries}
    if not len(images) == len(grid) == len(queries) or len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"need one set of patches and equally many queries per image, got {len(images)} "
            f"images, {len(grid)} sets of patches, lists of {sorted(counts)} queries"
        )
    columns = 1 + counts.pop()
    maps = [similarity_maps(features, points).cpu() for features, points in zip(grid, queries)]
    lowest = min(0.0, *(values.min().item() for values in maps))
    with saved_figure(path, (2.1 * columns + 0.9, 2.1 * len(images) + 0.3), dense=True) as figure:
        axes = figure.subplots(len(images), columns, squeeze=False)
        height, width = grid.shape[1:3]
        for row, (image, points) in enumerate(zip(images, queries)):
            extent = (0, width, height, 0)  # in patches, so that image and map share coordinates
            show_image(axes[row, 0], image, "image" if row == 0 else "", extent=extent)
            for column, (values, point) in enumerate(zip(maps[row], points), start=1):
                colour = QUERY_COLOURS[(column - 1) % len(QUERY_COLOURS)]
                axes[row, 0].add_patch(_frame(point, colour))
                title = f"similarity to query {column}" if row == 0 else ""
                axis = axes[row, column]
                show_image(axis, values, title, extent=extent, vmin=lowest, vmax=1, cmap="viridis")
                axis.add_patch(_frame(point, colour))
        mappable = axes[0, 1].images[0]
        figure.colorbar(mappable, ax=axes[:, 1:], label="cosine similarity", aspect=30)


def _frame(point: tuple[int, int], colour: str) -> Rectangle:
    """Frame around the patch at (row, column)."""
    return Rectangle((point[1], point[0]), 1, 1, fill=False, edgecolor=colour, linewidth=2)
