"""Export to ONNX: trace, save aside, compare with PyTorch, keep."""

import importlib
import importlib.metadata
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov3_mm.errors import hint

from .check import compare, require_within
from .graph import InputShapes, OutputGraph, with_constant_tables
from .request import ExportPlan, ExportReport, check_target, measured, staged, write_description

# --- Under ONNX Runtime ---


_NEEDED = ("onnx", "onnxscript", "onnxruntime")
DEFAULT_PROVIDER = "CPUExecutionProvider"


class RuntimeRefusalError(RuntimeError):
    """ONNX Runtime cannot run a file on the provider that was asked for."""


def require_onnx() -> dict[str, str]:
    """Versions of the packages that an ONNX export needs.

    Raises:
        ImportError: if one is missing.
    """
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"an ONNX export needs {', '.join(_NEEDED)}, and {name} cannot be imported "
                f"({error}); install them with: pip install 'dinov3_mm[export]'"
            ) from error
    return {name: importlib.import_module(name).__version__ for name in _NEEDED}


def check_provider(provider: str) -> str:
    """Return the name of an execution provider that this ONNX Runtime has.

    Raises:
        ValueError: if it has none of that name.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise ValueError(
            f"this onnxruntime has no provider {provider!r}; {hint(provider, available)}"
        )
    return provider


class OnnxModel:
    """A function from ``images`` to the outputs of a file.

    Args:
        path: the file.
        provider: execution provider.

    Raises:
        RuntimeRefusalError: if the provider cannot run the file.
    """

    def __init__(self, path: Path, provider: str = DEFAULT_PROVIDER) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # warnings concern its own placement of shape operators
        self.version = onnxruntime.__version__
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=[provider])
        except _runtime_errors() as error:
            raise RuntimeRefusalError(self._refusal(provider, error)) from error
        if self.session.get_providers()[0] != provider:
            raise RuntimeRefusalError(
                f"onnxruntime {self.version} did not start {provider} and fell back to "
                f"{self.session.get_providers()[0]}; see its messages above"
            )

    def _refusal(self, provider: str, error: Exception) -> str:
        return (
            f"onnxruntime {self.version} cannot run this file with {provider}, so it cannot be "
            f"checked and is not kept: {error}. Take another dtype or opset, or a provider that "
            "has these operators"
        )

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Run a batch (B, C, H, W)."""
        outputs: Sequence = self.session.run(None, {"images": images.numpy()})
        return [torch.from_numpy(output) for output in outputs]


def _runtime_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.NotImplemented,
        state.RuntimeException,
    )


# --- The graph ---


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


# --- 16-bit matrix products; everything else stays fp32 ---


# Norms, softmax, RoPE, activations and the residual stream stay in fp32: their values leave the
# range of fp16 in large models, and they take little of the time.
_PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention")


def lower_products(graph, dtype: str) -> None:
    """Run matrix products, convolutions and attention in 16 bits, in place.

    Weights become 16-bit; a cast stands before every other operand and behind every result.

    Args:
        graph: ``onnx_ir.Graph`` in fp32.
        dtype: 'fp16' or 'bf16'.

    Raises:
        ValueError: if a weight is beyond the range of fp16.
    """
    import onnx_ir as ir

    lowering = _Lowering(graph, dtype)
    for node in list(graph):
        if node.op_type in _PRODUCTS and node.inputs[0].dtype == ir.DataType.FLOAT:
            lowering.lower(node)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


class _Lowering:
    def __init__(self, graph, dtype: str) -> None:
        import ml_dtypes
        import onnx_ir as ir

        self.ir = ir
        self.graph = graph
        self.suffix = f"_{dtype}"
        self.kind = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[dtype]
        self.numpy_dtype = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
        self.lowered: dict = {}

    def lower(self, node) -> None:
        ir, graph = self.ir, self.graph
        for index, value in enumerate(node.inputs):
            if value is not None:
                node.replace_input_with(index, self._operand(value, node))
        if node.op_type == "Attention":
            precision = int(ir.DataType.FLOAT)
            node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", precision)
        result = node.outputs[0]
        cast = ir.node("Cast", [result], {"to": int(ir.DataType.FLOAT)})
        wide = cast.outputs[0]
        wide.shape, wide.type = result.shape, ir.TensorType(ir.DataType.FLOAT)
        for user, index in list(result.uses()):
            if user is not cast:
                user.replace_input_with(index, wide)
        for index, output in enumerate(graph.outputs):
            if output is result:
                graph.outputs[index] = wide
        # The fp32 value keeps the name, by which an output of the graph is called.
        wide.name, result.name = result.name, result.name + self.suffix
        result.type = ir.TensorType(self.kind)
        graph.insert_after(node, cast)

    def _operand(self, value, node):
        if value not in self.lowered:
            make = self._weight if value.is_initializer() else self._cast
            self.lowered[value] = make(value, node)
        return self.lowered[value]

    def _weight(self, value, node):
        wide = value.const_value.numpy()
        with np.errstate(over="ignore"):
            narrow = wide.astype(self.numpy_dtype)
        if not np.isfinite(narrow.astype(np.float32)).all():
            raise ValueError(
                f"weight {value.name} has values up to {np.abs(wide).max():.3g}, beyond the range "
                "of fp16; use dtype bf16 or fp32"
            )
        name = value.name + self.suffix
        weight = self.ir.Value(
            name=name,
            shape=value.shape,
            type=self.ir.TensorType(self.kind),
            const_value=self.ir.tensor(narrow, name=name),
        )
        self.graph.register_initializer(weight)
        return weight

    def _cast(self, value, node):
        cast = self.ir.node("Cast", [value], {"to": int(self.kind)})
        narrow = cast.outputs[0]
        narrow.name = value.name + self.suffix
        narrow.shape, narrow.type = value.shape, self.ir.TensorType(self.kind)
        self.graph.insert_before(node, cast)
        return narrow


# --- The export: trace, save aside, compare, keep ---


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
