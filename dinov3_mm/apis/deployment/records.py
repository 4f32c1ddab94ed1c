"""What an exported file says about itself."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dinov3_mm
from dinov3_mm.checkpoints import Statistics

from .gate import Bounds, Difference, as_records
from .graph import OUTPUTS, OutputGraph
from .shapes import InputShapes
from .staging import DESCRIPTION_SUFFIX


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
