"""Normalisation layers with fp32 statistics and an output in the dtype of the input."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm(nn.LayerNorm):
    """Affine LayerNorm over the last dimension that returns the dtype it was given.

    Torch computes the statistics in fp32 for every input dtype. CUDA autocast also returns fp32,
    which would pull a bf16 residual stream up; the result is cast back here.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (..., D)."""
        y = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def init_weights(self) -> None:
        """Reset to the identity: weight 1, bias 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class RMSNorm(nn.Module):
    """``x * rsqrt(mean(x^2) + eps)`` in fp32, cast back to the input dtype, times ``weight``."""

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dims))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (..., D)."""
        y = x.float()
        y = y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return y.to(x.dtype) * self.weight.to(x.dtype)

    def init_weights(self) -> None:
        """Reset the weight to 1."""
        nn.init.ones_(self.weight)


# Every released ViT uses 'layernormbf16', whose name means "for bf16 training": only eps differs.
_NORMS = {
    "layernorm": lambda dims: LayerNorm(dims, eps=1e-6),
    "layernormbf16": lambda dims: LayerNorm(dims, eps=1e-5),
    "rmsnorm": lambda dims: RMSNorm(dims, eps=1e-5),
}
NORM_LAYERS = tuple(_NORMS)


def build_norm(name: str, dims: int) -> nn.Module:
    """Build 'layernorm' (eps 1e-6), 'layernormbf16' (eps 1e-5) or 'rmsnorm' (eps 1e-5).

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in _NORMS:
        raise ValueError(f"norm_layer is {name!r}; expected one of {NORM_LAYERS}")
    return _NORMS[name](dims)
