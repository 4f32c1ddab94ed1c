"""16-bit matrix products in an ONNX graph; everything else stays fp32."""

import numpy as np

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
