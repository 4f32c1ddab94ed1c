"""Export to ONNX: trace, save aside, compare with PyTorch, keep."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .gate import compare, require_within
from .onnx_graph import DEFAULT_OPSET, check_opset, trace_onnx
from .onnx_precision import lower_products
from .onnx_runtime import DEFAULT_PROVIDER, OnnxModel, check_provider, require_onnx
from .plan import ExportPlan
from .records import ExportReport, measured, write_description
from .staging import check_target, staged

# A file of protocol buffers ends at 2 GiB; weights beyond this go to a file of their own.
_MAX_INLINE_BYTES = 1_800_000_000


def export_onnx(
    backbone: nn.Module,
    path: str | os.PathLike,
    *,
    opset: int = DEFAULT_OPSET,
    provider: str = DEFAULT_PROVIDER,
    dtype: str = "fp32",
    **plan: Any,
) -> ExportReport:
    """Write a backbone as an ONNX file that ONNX Runtime computes like PyTorch, or no file.

    The file has one input, ``images`` float32 (B, C, H, W), and float32 outputs; see
    :class:`OutputGraph` for their names. Its metadata, each value JSON, hold the statistics of the
    input, the architecture and the measured differences; so does ``<name>.json`` beside it. Weights
    beyond 1.8 GB lie in ``<name>.data`` beside it.

    Args:
        backbone: in eval mode, fp32, on the CPU.
        path: target, ending in ``.onnx``.
        opset: version of the ONNX operators, 18 to 23.
        provider: execution provider of ONNX Runtime to compare on.
        dtype: of matrix products and their weights: 'fp32', 'fp16' or 'bf16'.
        statistics: of the input normalisation, see ``read_statistics``. Required.
        outputs, layers: see :class:`OutputGraph`.
        image_sizes: (height, width) to check with. Without ``dynamic`` the one size that the file
            takes, 224 by default; with it 224, 512 and 336x448 by default.
        dynamic: height and width may vary.
        batch: fix the number of images; None lets it vary.
        images: to compare with, see ``load_pixels``; None renders scenes.
        tolerance: largest |difference|; for 16 bits as a share of the largest value. None takes
            1e-4 (fp32), 0.01 (fp16), 0.05 (bf16).
        source: name or file of the weights, for the metadata.

    Raises:
        ExportMismatchError: if the file differs by more than the tolerance; nothing is kept.
        ImportError: if onnx, onnxscript or onnxruntime is missing.
        RuntimeRefusalError: if ONNX Runtime cannot run the file; nothing is kept.
        ValueError: if an argument does not fit.
    """
    versions = require_onnx()
    path = check_target(path, ".onnx")
    check_opset(opset)
    check_provider(provider)
    resolved = ExportPlan.resolve(backbone, dtype=dtype, **plan)
    metadata = resolved.metadata | {"format": "onnx", "opset": opset, "provider": provider}
    metadata["versions"] |= versions
    with staged(path) as partial:
        _write(resolved, opset, dtype, partial)
        differences = _measure(resolved, OnnxModel(partial, provider))
        require_within(differences, resolved.bounds)
        metadata |= measured(differences, resolved.bounds)
        _append_metadata(partial, metadata)
        write_description(partial, metadata)
    return ExportReport(path, metadata, differences, resolved.bounds)


def _write(plan: ExportPlan, opset: int, dtype: str, path: Path) -> None:
    program = trace_onnx(plan.graph, plan.shapes, opset)
    if dtype != "fp32":
        lower_products(program.model.graph, dtype)
    weights = program.model.graph.initializers.values()
    num_bytes = sum(value.const_value.nbytes for value in weights)
    program.save(path, external_data=num_bytes > _MAX_INLINE_BYTES)


def _measure(plan: ExportPlan, exported: OnnxModel) -> list:
    with torch.no_grad():
        return compare(plan.graph, exported, plan.batches, plan.graph.output_names)


def _append_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Add metadata to a file without writing its weights again.

    Protocol buffers that follow each other in a file are one message; repeated fields add up.
    """
    import onnx

    addition = onnx.ModelProto()
    for key, value in metadata.items():
        addition.metadata_props.add(key=key, value=json.dumps(value))
    with path.open("ab") as file:
        file.write(addition.SerializeToString())
