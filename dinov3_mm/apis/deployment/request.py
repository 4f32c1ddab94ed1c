"""The checked arguments that both exports have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dinov3_mm.apis.preparation import ImageLike
from dinov3_mm.checkpoints import Statistics
from dinov3_mm.suggest import hint

from .check_images import CheckBatches
from .gate import Bounds
from .graph import DEFAULT_OUTPUTS, OutputGraph
from .records import describe
from .shapes import InputShapes, Size

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
