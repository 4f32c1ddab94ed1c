"""An exported file against PyTorch: the images, the comparison, the verdict."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dinov3_mm.checkpoints import Statistics
from dinov3_mm.datasets import SyntheticScenes
from dinov3_mm.datasets.image_files import LeftOut, find_files, image_extensions
from dinov3_mm.datasets.images import read_image
from dinov3_mm.features.preparation import ImageLike, ImagePreparation, load_pixels

from .graph import InputShapes, Size

# --- The comparison and the verdict ---


Function = Callable[[Tensor], Sequence[Tensor]]


class ExportMismatchError(RuntimeError):
    """An exported file does not compute what the model computes in PyTorch."""


@dataclass(frozen=True)
class Bounds:
    """How far a file may be from the model in fp32.

    Attributes:
        tolerance: largest |difference| of any value; if ``relative``, as a share of the largest
            |expected| value of the output.
        relative: see above.
        min_cosine: least cosine between a token (or position) and its expected value; None leaves
            that out.
    """

    tolerance: float
    relative: bool = False
    min_cosine: float | None = None

    def with_tolerance(self, tolerance: float) -> "Bounds":
        """The same with another tolerance.

        Raises:
            ValueError: if it is not positive.
        """
        if not tolerance > 0:
            raise ValueError(f"tolerance is {tolerance}; expected a positive number")
        return replace(self, tolerance=tolerance)

    def admit(self, difference: "Difference") -> bool:
        """Whether a difference is within the bounds; one that is not a number is not."""
        limit = self.tolerance * (difference.max_expected if self.relative else 1)
        close = difference.max_abs <= limit
        return close and (self.min_cosine is None or difference.min_cosine >= self.min_cosine)

    def __str__(self) -> str:
        share = " of the largest value" if self.relative else ""
        cosine = "" if self.min_cosine is None else f", cosine from {self.min_cosine} on"
        return f"difference up to {self.tolerance:g}{share}{cosine}"


@dataclass(frozen=True)
class Difference:
    """Between the file and the model, for one output and one batch.

    Attributes:
        output: name of the output.
        images: shape (B, C, H, W) of the batch.
        max_abs: largest |difference|.
        max_expected: largest |value| of the model.
        min_cosine: least cosine of a token or position.
    """

    output: str
    images: tuple[int, ...]
    max_abs: float
    max_expected: float
    min_cosine: float


def compare(
    model: Function, exported: Function, batches: Iterable[Tensor], names: Sequence[str]
) -> list[Difference]:
    """Run both on each batch; one difference for each output and batch.

    Raises:
        ExportMismatchError: if the shape of an output is another.
    """
    differences = []
    for batch in batches:
        for name, actual, expected in zip(names, exported(batch), model(batch), strict=True):
            if actual.shape != expected.shape:
                raise ExportMismatchError(
                    f"output {name!r} has shape {tuple(actual.shape)} for images "
                    f"{tuple(batch.shape)}; the model gives {tuple(expected.shape)}"
                )
            differences.append(_difference(name, batch, actual.double(), expected.double()))
    return differences


def _difference(name: str, batch: Tensor, actual: Tensor, expected: Tensor) -> Difference:
    channels = 1 if expected.ndim == 4 else -1  # a feature map (B, C, h, w), else tokens (..., C)
    cosine = torch.cosine_similarity(actual, expected, dim=channels)
    return Difference(
        output=name,
        images=tuple(batch.shape),
        max_abs=(actual - expected).abs().max().item(),
        max_expected=expected.abs().max().item(),
        min_cosine=cosine.min().item(),
    )


def require_within(differences: Sequence[Difference], bounds: Bounds) -> None:
    """Pass if every difference is within the bounds.

    Raises:
        ExportMismatchError: else, with the differences that are not.
    """
    outside = [difference for difference in differences if not bounds.admit(difference)]
    if outside:
        listed = "; ".join(
            f"{d.output} for images {d.images}: difference {d.max_abs:.3g}, largest value "
            f"{d.max_expected:.3g}, least cosine {d.min_cosine:.6f}"
            for d in outside
        )
        raise ExportMismatchError(
            f"the exported file is not the model: expected a {bounds}; {listed}. Nothing was kept"
        )


def as_records(differences: Sequence[Difference]) -> list[dict]:
    """The differences as JSON."""
    return [asdict(difference) for difference in differences]


def print_differences(
    differences: Sequence[Difference], bounds: Bounds, console: Console | None = None
) -> None:
    """Print one line for each output and batch."""
    table = Table(title=f"file against PyTorch fp32; allowed: {bounds}")
    for title, justify in (
        ("output", "left"),
        ("images", "left"),
        ("max |difference|", "right"),
        ("max |value|", "right"),
        ("min cosine", "right"),
        ("", "left"),
    ):
        table.add_column(title, justify=justify)
    for d in differences:
        table.add_row(
            d.output,
            "x".join(map(str, d.images)),
            f"{d.max_abs:.2e}",
            f"{d.max_expected:.2f}",
            f"{d.min_cosine:.7f}",
            "ok" if bounds.admit(d) else "[red]outside",
        )
    (console or Console()).print(table)


# --- The images ---


# Evenly spaced files of a folder, or rendered scenes: enough to tell a wrong graph from rounding.
NUM_IMAGES = 2
_SCENES_SEED = 2026


def find_images(paths: Sequence[str | os.PathLike]) -> list[str]:
    """The files among ``paths``, and a few of those in folders.

    Raises:
        FileNotFoundError: if a path does not exist or a folder holds no images.
    """
    found: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no image or folder of images at {path}")
        if path.is_file():
            found.append(str(path))
            continue
        left_out = LeftOut()
        files = list(find_files(str(path), image_extensions(), left_out))
        if not files:
            raise FileNotFoundError(
                f"no images under {path}" + (f"; {left_out}" if left_out else "")
            )
        found += (str(path / file) for file in files[:: -(-len(files) // NUM_IMAGES)])
    return found


class CheckBatches:
    """Normalised batches (B, C, H, W) of every shape that is checked.

    Each size is run with all images at once, the first also with one image, unless the batch is
    fixed.

    Args:
        shapes: sizes and batch.
        statistics: of the input normalisation.
        images: paths, arrays (H, W, C) or anything that ``load_pixels`` takes; None renders scenes.
    """

    def __init__(
        self,
        shapes: InputShapes,
        statistics: Statistics,
        images: Sequence[ImageLike] | None = None,
    ) -> None:
        if images is None and shapes.channels != 3:
            raise ValueError(
                f"the backbone takes {shapes.channels} channels and the rendered scenes have 3; "
                "give images to check the file with"
            )
        if images is not None and not len(images):
            raise ValueError("images is empty; give at least one, or None for rendered scenes")
        self.shapes = shapes
        self.statistics = statistics
        self.images = images

    def __iter__(self) -> Iterator[Tensor]:
        for index, size in enumerate(self.shapes.sizes):
            batch = self._batch(size)
            if self.shapes.batch:
                repeats = -(-self.shapes.batch // len(batch))
                yield batch.repeat(repeats, 1, 1, 1)[: self.shapes.batch]
                continue
            yield batch
            if index == 0 and len(batch) > 1:
                yield batch[:1]

    def _batch(self, size: Size) -> Tensor:
        images: Sequence[ImageLike] | None = self.images
        if images is None:
            scenes = SyntheticScenes(NUM_IMAGES, seed=_SCENES_SEED, image_size=max(size))
            images = [scenes.load_image(index) for index in range(NUM_IMAGES)]
        prepare = ImagePreparation(
            self.shapes.channels, self.shapes.multiple, size, "short_side_crop"
        )
        pixels = torch.stack([prepare(load_pixels(image, read_image)).float() for image in images])
        mean, std = (
            torch.tensor(values).view(-1, 1, 1)
            for values in (self.statistics.mean, self.statistics.std)
        )
        return (pixels / 255 - mean) / std
