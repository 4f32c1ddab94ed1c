"""Linear layers whose products run in float8 (e4m3) with dynamic scales.

Parameters stay what they are; each product quantises its operands on the way. On a GPU that has
float8 matrix products torch's scaled product is used, elsewhere the same arithmetic in float32.
"""

import re

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .attention import Linear

FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(FP8).max
_SMALLEST_PEAK = 1e-12
_ALIGNMENT = 64


def enable_fp8(module: nn.Module, pattern: str = "blocks") -> list[str]:
    """Let the linear layers whose path matches a regular expression multiply in float8.

    Args:
        module: a backbone.
        pattern: searched for in the dotted path of each layer.

    Returns:
        The paths of the layers.

    Raises:
        ValueError: If no layer matches, or a matching layer has a width that is no multiple of 64.
    """
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, Linear) and re.search(pattern, name)
    }
    if not layers:
        raise ValueError(f"fp8: no linear layer of {type(module).__name__} matches {pattern!r}")
    for name, layer in layers.items():
        if layer.in_features % _ALIGNMENT or layer.out_features % _ALIGNMENT:
            raise ValueError(
                f"fp8: {name} maps {layer.in_features} to {layer.out_features} channels; both must "
                f"be multiples of {_ALIGNMENT} (leave it out by the pattern, or choose another "
                "width, e.g. ffn_layer='swiglu64')"
            )
        layer.product = fp8_linear
    return list(layers)


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` in float8, in bfloat16 out.

    Activations are scaled by token and weights by output channel; in the backward pass the
    gradient of ``x`` is such a product with one scale for all weights, those of weight and bias
    are ordinary.

    Args:
        x: (..., C).
        weight: (D, C).
        bias: (D,) or None.
    """
    flat = x.flatten(0, -2).to(torch.bfloat16)
    product = _Fp8Product.apply(flat, weight.to(torch.bfloat16)).unflatten(0, x.shape[:-1])
    return product if bias is None else product + bias.to(torch.bfloat16)


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _scaled_product(x, _row_scales(x), weight, _row_scales(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        scales = _row_scales(weight).amax().expand(weight.shape[1], 1)
        grad_x = _scaled_product(
            grad_output, _row_scales(grad_output), weight.t(), scales.contiguous()
        )
        return grad_x, grad_output.t() @ x


def _row_scales(rows: Tensor) -> Tensor:
    """(n, 1) float32 factors that fill the range of float8."""
    peaks = rows.abs().amax(dim=1, keepdim=True).float()
    return peaks.clamp(min=_SMALLEST_PEAK) / _FP8_MAX


def _scaled_product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    """``a @ b.T`` (n, m) in bfloat16 of rows that are quantised by their scales."""
    # The kernel reads both along the dimension that is summed; an elementwise result would keep the
    # order of a transposed operand, which the kernel refuses. A copy of one byte per value.
    a8 = (a.float() / a_scales).to(FP8).contiguous()
    b8 = (b.float() / b_scales).to(FP8).contiguous()
    if a.is_cuda:
        return torch._scaled_mm(
            a8, b8.t(), scale_a=a_scales, scale_b=b_scales.t(), out_dtype=torch.bfloat16
        )
    product = (a8.float() @ b8.float().t()).to(torch.bfloat16).float()
    return (product * a_scales * b_scales.t()).to(torch.bfloat16)
