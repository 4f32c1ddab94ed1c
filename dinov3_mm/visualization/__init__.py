"""Figures of representations and runs: PCA colours, similarity maps, curves."""

from .curves import plot_curves, points_vs_minutes, read_scalars
from .patches import (
    PatchPCA,
    foreground_mask,
    pca_images,
    save_pca_grid,
    save_similarity_figure,
    similarity_maps,
)

__all__ = [
    "PatchPCA",
    "foreground_mask",
    "pca_images",
    "plot_curves",
    "points_vs_minutes",
    "read_scalars",
    "save_pca_grid",
    "save_similarity_figure",
    "similarity_maps",
]
