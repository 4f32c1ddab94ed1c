"""A linear layer that takes the faster of torch's two CPU libraries."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# On the CPU ``F.linear`` multiplies fp32 matrices with MKL, which leaves AVX-512 unused on
# processors of other makers, and bf16 ones with oneDNN after a pass over the output for the bias.
# This operator, which torch.compile calls, is oneDNN for both, with the bias inside: half the time
# in fp32 on an AMD EPYC (Zen 5). It has no gradient.
_ONEDNN_LINEAR = None
_ONEDNN_DTYPES: tuple[torch.dtype, ...] = ()
if torch.backends.mkldnn.is_available():
    _ONEDNN_LINEAR = torch.ops.mkldnn._linear_pointwise.default
    _ONEDNN_DTYPES = (torch.float32,)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        _ONEDNN_DTYPES += (torch.bfloat16,)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, with oneDNN for inference on the CPU."""
    if _suits_onednn(x, weight):
        return _ONEDNN_LINEAR(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in _ONEDNN_DTYPES
        and type(weight) is nn.Parameter  # subclasses have products of their own
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch.backends.mkldnn.enabled
    )


class Linear(nn.Linear):
    """``nn.Linear``, with oneDNN for inference on the CPU.

    Attributes:
        product: ``product(x, weight, bias)``; another kind of matrix product may take its place.
    """

    product = staticmethod(linear)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., C) to (..., D)."""
        return self.product(x, self.weight, self.bias)
