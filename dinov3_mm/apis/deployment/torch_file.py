"""Export with torch.export: trace, save aside, reload, compare with PyTorch, keep."""

import copy
import json
import os
import warnings
from typing import Any

import torch
from torch import nn

from .check import compare, require_within
from .graph import with_constant_tables
from .request import (
    DTYPES,
    ExportPlan,
    ExportReport,
    check_target,
    measured,
    staged,
    write_description,
)

# Name of the metadata inside a file, for the ``extra_files`` of ``torch.export.load``.
METADATA_FILE = "dinov3_mm.json"


def export_torch(
    backbone: nn.Module, path: str | os.PathLike, *, dtype: str = "fp32", **plan: Any
) -> ExportReport:
    """Write a backbone as a ``torch.export`` file that computes like the model, or no file.

    ``torch.export.load(path).module()`` runs it without this package. It takes ``images`` float32
    (B, C, H, W) and returns a tuple of float32 tensors in the order of the metadata's ``outputs``.
    The metadata are in the file (``extra_files={'dinov3_mm.json': ''}``) and, with the measured
    differences, in ``<name>.json`` beside it.

    Args:
        backbone: in eval mode, fp32, on the CPU.
        path: target, ending in ``.pt2``.
        dtype: of the parameters and, inside, the tokens: 'fp32', 'fp16' or 'bf16'. RoPE and the
            statistics of norms stay fp32.
        **plan: ``statistics``, ``outputs``, ``layers``, ``image_sizes``, ``dynamic``, ``batch``,
            ``images``, ``tolerance`` and ``source``, see :func:`export_onnx`.

    Raises:
        ExportMismatchError: if the file differs by more than the tolerance; nothing is kept.
        ValueError: if an argument does not fit.
    """
    path = check_target(path, ".pt2")
    resolved = ExportPlan.resolve(backbone, dtype=dtype, **plan)
    metadata = resolved.metadata | {"format": "torch.export"}
    with staged(path) as partial, torch.no_grad(), warnings.catch_warnings():
        # Of torch's own, about itself and about the buffers that it reads a file into.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        program = _trace(resolved, dtype)
        torch.export.save(program, partial, extra_files={METADATA_FILE: json.dumps(metadata)})
        exported = torch.export.load(partial).module()
        names = resolved.graph.output_names
        differences = compare(resolved.graph, exported, resolved.batches, names)
        require_within(differences, resolved.bounds)
        metadata |= measured(differences, resolved.bounds)
        write_description(partial, metadata)
    return ExportReport(path, metadata, differences, resolved.bounds)


def _trace(plan: ExportPlan, dtype: str) -> torch.export.ExportedProgram:
    """Trace a graph; for one image size the RoPE tables are constants."""
    graph, shapes = plan.graph, plan.shapes
    backbone = graph.backbone if dtype == "fp32" else _in_dtype(graph.backbone, DTYPES[dtype])
    if not shapes.dynamic:
        backbone = with_constant_tables(backbone, shapes.sizes[0])
    return torch.export.export(
        graph.with_backbone(backbone),
        (torch.zeros(shapes.traced_shape),),
        dynamic_shapes=shapes.dynamic_shapes(),
        strict=False,
    )


def _in_dtype(backbone: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a backbone in another dtype, RoPE periods excepted: rounding them moves tokens."""
    clone = copy.deepcopy(backbone).to(dtype)
    rope = getattr(clone, "rope_embed", None)
    if rope is not None:
        rope.periods = backbone.rope_embed.periods.clone()
    return clone
