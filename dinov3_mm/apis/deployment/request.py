"""What is exported, with which bounds and to which files; what a file says about itself."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dinov3_mm
from dinov3_mm.checkpoints import Statistics, atomic_write
from dinov3_mm.checkpoints.io import PARTIAL_SUFFIX
from dinov3_mm.errors import hint
from dinov3_mm.features.preparation import ImageLike

from .check import Bounds, CheckBatches, Difference, as_records
from .graph import DEFAULT_OUTPUTS, OUTPUTS, InputShapes, OutputGraph, Size

# --- Files that belong together and appear together, or not at all ---


# Appended to the name of a file.
WEIGHTS_SUFFIX = ".data"
DESCRIPTION_SUFFIX = ".json"


def check_target(path: str | os.PathLike, suffix: str) -> Path:
    """The path of a file to write.

    Raises:
        ValueError: if its name does not end in ``suffix``.
        IsADirectoryError: if there is a folder of that name.
    """
    path = Path(path).expanduser()
    if path.suffix != suffix:
        raise ValueError(f"the file is called {path.name}; its name must end in {suffix}")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write a file at {path}: a folder of that name exists")
    return path


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Write ``path`` and what belongs to it aside, and put them in place when the body ends.

    The body writes to the yielded path, which has the final name in a hidden folder beside
    ``path``: a file may name its neighbours. It may also write weights (``<name>.data``) and a
    description (``<name>.json``). When the body raises, nothing is kept, and
    what was there before stays.

    A file with weights beside it is gone while the two are exchanged, so that it is never seen with
    the weights of another; a process killed then leaves the weights alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    folder.mkdir()
    try:
        partial = folder / path.name
        yield partial
        weights, description = _neighbours(partial)
        old_weights, old_description = _neighbours(path)
        if weights.exists() or old_weights.exists():
            path.unlink(missing_ok=True)
            old_weights.unlink(missing_ok=True)
        _move(weights, old_weights)
        _move(description, old_description)
        _move(partial, path)
    finally:
        shutil.rmtree(folder)


def _neighbours(path: Path) -> tuple[Path, Path]:
    return (
        path.with_name(path.name + WEIGHTS_SUFFIX),
        path.with_name(path.name + DESCRIPTION_SUFFIX),
    )


def _move(source: Path, target: Path) -> None:
    if source.exists():
        with atomic_write(target) as aside:
            os.replace(source, aside)


# --- What an exported file says about itself ---


@dataclass(frozen=True)
class ExportReport:
    """The result of an export.

    Attributes:
        path: the file.
        metadata: what ``<name>.json`` beside it holds.
        differences: between the file and the model.
        bounds: that the differences are within.
    """

    path: Path
    metadata: Mapping[str, Any]
    differences: list[Difference]
    bounds: Bounds


def describe(
    graph: OutputGraph,
    shapes: InputShapes,
    statistics: Statistics,
    *,
    dtype: str,
    source: str | None,
) -> dict[str, Any]:
    """Metadata of a file, apart from what the comparison measured."""
    backbone: nn.Module = graph.backbone
    return {
        "source": source,
        "backbone": type(backbone).__name__,
        "arch": backbone.arch_settings,
        "mean": list(statistics.mean),
        "std": list(statistics.std),
        "input": "images, float32 (B, C, H, W): RGB in [0, 1], minus mean, divided by std",
        "image_sizes": [list(size) for size in shapes.sizes],
        "dynamic": shapes.dynamic,
        "batch": shapes.batch,
        "size_multiple": shapes.multiple,
        "token_stride": backbone.token_stride,
        "outputs": {name: OUTPUTS[name.split("_")[0]] for name in graph.output_names},
        "layers": list(graph.layers),
        "dtype": dtype,
        "versions": {"dinov3_mm": dinov3_mm.__version__, "torch": torch.__version__},
    }


def measured(differences: list[Difference], bounds: Bounds) -> dict[str, Any]:
    """Metadata that the comparison adds."""
    return {
        "tolerance": bounds.tolerance,
        "tolerance_relative": bounds.relative,
        "min_cosine": bounds.min_cosine,
        "differences": as_records(differences),
    }


def write_description(path: Path, metadata: Mapping[str, Any]) -> None:
    """Write metadata for people beside a file."""
    target = path.with_name(path.name + DESCRIPTION_SUFFIX)
    target.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


# --- The checked arguments that both exports have in common ---


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BOUNDS = {
    "fp32": Bounds(1e-4),
    # Whole backbones with redrawn weights measure 0.002 and 1 - 6e-7 in fp16, 0.018 and 0.99996 in
    # bf16.
    "fp16": Bounds(1e-2, relative=True, min_cosine=0.9999),
    "bf16": Bounds(5e-2, relative=True, min_cosine=0.999),
}


@dataclass(frozen=True)
class ExportPlan:
    """What is exported, and how it is checked.

    Attributes:
        graph: of the backbone's outputs.
        shapes: of the input.
        batches: to compare with.
        bounds: of the differences.
        metadata: what is known before the comparison.
    """

    graph: OutputGraph
    shapes: InputShapes
    batches: CheckBatches
    bounds: Bounds
    metadata: dict[str, Any]

    @classmethod
    def resolve(
        cls,
        backbone: nn.Module,
        *,
        statistics: Statistics,
        outputs: Sequence[str] = DEFAULT_OUTPUTS,
        layers: Sequence[int] | None = None,
        image_sizes: Sequence[Size] | None = None,
        dynamic: bool = False,
        batch: int | None = None,
        dtype: str = "fp32",
        images: Sequence[ImageLike] | None = None,
        tolerance: float | None = None,
        source: str | None = None,
    ) -> "ExportPlan":
        """Check every argument; see :func:`export_onnx` for what they mean.

        Raises:
            ValueError: if one does not fit.
        """
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; {hint(str(dtype), DTYPES)}")
        _check_backbone(backbone, statistics)
        graph = OutputGraph(backbone, outputs, layers).eval()
        shapes = InputShapes.resolve(backbone, image_sizes, dynamic=dynamic, batch=batch)
        bounds = BOUNDS[dtype] if tolerance is None else BOUNDS[dtype].with_tolerance(tolerance)
        batches = CheckBatches(shapes, statistics, images)
        metadata = describe(graph, shapes, statistics, dtype=dtype, source=source)
        return cls(graph, shapes, batches, bounds, metadata)


def _check_backbone(backbone: nn.Module, statistics: Statistics) -> None:
    if any(module.training for module in backbone.modules()):
        raise ValueError("the backbone is in training mode; call backbone.eval() first")
    others = {
        f"{parameter.dtype} on {parameter.device}"
        for parameter in backbone.parameters()
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu"
    }
    if others:
        raise ValueError(
            f"the backbone has parameters of {', '.join(sorted(others))}; give it in fp32 on the "
            "CPU (backbone.float().cpu()); dtype chooses that of the file"
        )
    channels = backbone.arch_settings["in_channels"]
    if len(statistics.mean) != channels or len(statistics.std) != channels:
        raise ValueError(f"statistics {tuple(statistics)} do not fit {channels} image channels")
