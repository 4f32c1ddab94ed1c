"""Patch features as pictures: principal components as colours, similarity to one patch."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

from .figures import patch_grid, saved_figure, show_image

# --- Principal components as colours ---


class PatchPCA:
    """Projection of patch features onto three colours, fitted once and applied to any image.

    The three leading components are whitened and squashed, colour = sigmoid(2 z), so that the scale
    is the same for every model. Each component's sign is fixed by its largest loading, so that a
    second fit gives the same colours.

    Args:
        patches: (..., D) features to fit on, at least four of them.
    """

    def __init__(self, patches: Tensor) -> None:
        rows = patches.reshape(-1, patches.shape[-1]).double()
        if len(rows) < 4 or rows.shape[1] < 3:
            raise ValueError(
                f"three components need at least 4 patches of 3 dimensions, got {tuple(rows.shape)}"
            )
        self.mean = rows.mean(dim=0)
        centred = rows - self.mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
        vectors, values = vectors[:, -3:].flip(1), values[-3:].flip(0).clamp_min(0)
        largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
        self.components = vectors * largest.sign()  # (D, 3)
        floor = torch.finfo(torch.float32).eps * values[0].clamp_min(1e-30)
        self.deviation = torch.maximum(values, floor).sqrt()

    def project(self, patches: Tensor) -> Tensor:
        """Whitened components (..., 3) of patch features (..., D)."""
        z = (patches.double() - self.mean) @ self.components / self.deviation
        return z.float()

    def colours(self, patches: Tensor) -> Tensor:
        """RGB in [0, 1], (..., 3)."""
        return torch.sigmoid(2 * self.project(patches))


def foreground_mask(patches: Tensor, bright_side: bool | None = None) -> Tensor:
    """Split patches (N, h, w, D) in two along the first principal component: (N, h, w) bool.

    The cut is Otsu's threshold of the component. Without ``bright_side`` the foreground is the side
    that touches the image border less, which fits images with a centred subject.
    """
    score = PatchPCA(patches).project(patches)[..., 0]
    side = score > _otsu(score.flatten())
    if bright_side is None:
        border = torch.ones_like(side)
        border[:, 1:-1, 1:-1] = False
        bright_side = bool(side[border].float().mean() <= side.float().mean())
    return side if bright_side else ~side


def pca_images(patches: Tensor, foreground: Tensor | None = None) -> Tensor:
    """Colours of the patches of a set of images, comparable across the set.

    Args:
        patches: (N, h, w, D) or, for square images, (N, P, D).
        foreground: (N, h, w) bool; components are fitted on these patches, the rest is black.

    Returns:
        (N, h, w, 3) RGB in [0, 1].
    """
    grid = patch_grid(patches)
    if foreground is None:
        return PatchPCA(grid).colours(grid)
    if foreground.shape != grid.shape[:3]:
        raise ValueError(
            f"foreground {tuple(foreground.shape)} must be the patch grid {tuple(grid.shape[:3])}"
        )
    return PatchPCA(grid[foreground]).colours(grid) * foreground[..., None]


def save_pca_grid(
    path: str | Path,
    images: Sequence,
    patches: Tensor | dict[str, Tensor],
    *,
    foreground: bool = False,
    columns: int = 4,
) -> None:
    """PNG with each image beside its PCA colours, for one or several models.

    Args:
        path: file to write.
        images: N images, (3, S, S) or (S, S, 3) uint8.
        patches: (N, P, D) features of these images, or several by the title of their panel.
        foreground: blacken the background found by `foreground_mask`.
        columns: images per row of the figure.
    """
    named = patches if isinstance(patches, dict) else {"PCA of patches": patches}
    panels = {}
    for title, values in named.items():
        grid = patch_grid(values)
        if len(grid) != len(images):
            raise ValueError(f"{len(images)} images but {len(grid)} sets of patches for {title!r}")
        panels[title] = pca_images(grid, foreground_mask(grid) if foreground else None)
    columns = min(columns, len(images))
    rows, width = -(-len(images) // columns), 1 + len(panels)
    with saved_figure(path, (1.7 * columns * width, 1.7 * rows + 0.3), dense=True) as figure:
        axes = figure.subplots(rows, columns * width, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for index, image in enumerate(images):
            row, column = divmod(index, columns)
            cells = axes[row, column * width : (column + 1) * width]
            show_image(cells[0], image, "image" if row == 0 else "")
            for cell, (title, colours) in zip(cells[1:], panels.items()):
                show_image(cell, colours[index], title if row == 0 else "")


def _otsu(values: Tensor, bins: int = 128) -> float:
    """Threshold that maximises the variance between the two classes."""
    counts, edges = torch.histogram(values.float().cpu(), bins)
    centres = (edges[:-1] + edges[1:]) / 2
    weight = counts.cumsum(0) / counts.sum()
    moment = (counts * centres).cumsum(0) / counts.sum()
    between = (moment[-1] * weight - moment).square() / (weight * (1 - weight)).clamp_min(1e-9)
    best = between >= between.max() * (1 - 1e-6)  # a gap between the classes is a plateau
    return edges[1:][best].mean().item()


# --- Similarity to one patch: what dense features take for the same thing ---


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
