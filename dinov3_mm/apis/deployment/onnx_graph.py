"""From an :class:`OutputGraph` to the graph of an ONNX file."""

import warnings
from collections.abc import Sequence

import torch

from .graph import OutputGraph, with_constant_tables
from .shapes import InputShapes

# 20 has GELU and LayerNorm as single operators, 23 also attention.
OPSETS = range(18, 24)
DEFAULT_OPSET = 20

_VARYING_DIMS = {
    "cls": (),
    "registers": (),
    "patches": (None, "num_patches"),
    "featmap": (None, None, "rows", "columns"),
}


def check_opset(opset: int) -> int:
    """Return ``opset``, or raise a ``ValueError`` if it is none of :data:`OPSETS`."""
    if opset not in OPSETS:
        raise ValueError(f"opset is {opset}; expected {OPSETS[0]} to {OPSETS[-1]}")
    return opset


def trace_onnx(graph: OutputGraph, shapes: InputShapes, opset: int):
    """Trace a graph to a ``torch.onnx.ONNXProgram`` with one input, ``images``.

    For one image size the RoPE tables are constants; for varying sizes the file computes them from
    the shape of its input.
    """
    if not shapes.dynamic:
        graph = graph.with_backbone(with_constant_tables(graph.backbone, shapes.sizes[0]))
    with torch.no_grad(), warnings.catch_warnings():
        # Of torch's own, about itself.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.onnx.export(
            graph,
            (torch.zeros(shapes.traced_shape),),
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=graph.output_names,
            dynamic_shapes=shapes.dynamic_shapes(),
            verbose=False,
        )
    _name_dimensions(program.model.graph, graph.output_names, shapes)
    return program


def _name_dimensions(graph, names: Sequence[str], shapes: InputShapes) -> None:
    """Give varying dimensions the names that a reader expects instead of torch's symbols."""
    (images,) = graph.inputs
    for axis, name in shapes.varying.items():
        images.shape[axis] = name
    for value, name in zip(graph.outputs, names, strict=True):
        if not shapes.batch:
            value.shape[0] = "batch"
        if shapes.dynamic:
            kind, _, layer = name.partition("_")
            for axis, dim in enumerate(_VARYING_DIMS[kind]):
                if dim:
                    value.shape[axis] = f"{dim}_{layer}" if layer else dim
