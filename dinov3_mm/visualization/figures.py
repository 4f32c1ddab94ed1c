"""What all figures share: a canvas without a display, one style, and an atomic save."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from dinov3_mm.checkpoints.io import atomic_write

# Okabe-Ito colours: distinguishable with the common colour-vision deficiencies and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
}


@contextmanager
def saved_figure(
    path: str | Path, size: tuple[float, float], *, dense: bool = False, dpi: int = 120
) -> Iterator[Figure]:
    """Figure of ``size`` inches that is written to ``path`` (by its suffix) when the block ends.

    ``dense`` packs the panels closely, for images without axes.
    It owns an Agg canvas: neither a display nor pyplot's global state is involved. The file appears
    under its name only when it is complete.

    Raises:
        ValueError: if the suffix is not .png, .pdf or .svg.
    """
    path = Path(path)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"a figure is a .png, .pdf or .svg file, got {str(path)!r}")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        if dense:
            figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
        yield figure
        with atomic_write(path) as partial:
            figure.savefig(partial, dpi=dpi, format=path.suffix[1:])


def show_image(axes, image: Tensor | np.ndarray, title: str = "", **options) -> None:
    """Draw an image without axes: (H, W, 3), (3, H, W) or (H, W)."""
    values = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else image
    if values.ndim == 3 and values.shape[0] == 3 and values.shape[2] != 3:
        values = values.transpose(1, 2, 0)
    axes.imshow(values, **options)
    axes.set_axis_off()
    if title:
        axes.set_title(title)


def patch_grid(patches: Tensor) -> Tensor:
    """Square grid of patch tokens: (N, P, D) -> (N, sqrt(P), sqrt(P), D); grids pass unchanged."""
    if patches.ndim == 4:
        return patches
    side = round(patches.shape[-2] ** 0.5) if patches.ndim == 3 else 0
    if not side or side**2 != patches.shape[-2]:
        raise ValueError(
            f"expected patches (N, P, D) of square images or a grid (N, h, w, D), got "
            f"{tuple(patches.shape)}"
        )
    return patches.unflatten(1, (side, side))
