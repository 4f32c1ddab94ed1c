"""The feed-forward networks of the ViT: GELU MLP and SwiGLU."""

from torch import Tensor, nn
from torch.nn import functional as F

from .linear import Linear


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))`` with the exact (erf) GELU."""

    def __init__(self, dims: int, hidden_dims: int, *, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = Linear(dims, hidden_dims, bias=bias)
        self.fc2 = Linear(hidden_dims, dims, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., D) to (..., D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """``w3(silu(w1(x)) * w2(x))`` (Shazeer, arXiv 2002.05202)."""

    def __init__(self, dims: int, hidden_dims: int, *, bias: bool = True) -> None:
        super().__init__()
        self.w1 = Linear(dims, hidden_dims, bias=bias)
        self.w2 = Linear(dims, hidden_dims, bias=bias)
        self.w3 = Linear(hidden_dims, dims, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., D) to (..., D)."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class FusedSwiGLU(nn.Module):
    """:class:`SwiGLU` with one matrix for both halves: ``w3(silu(a) * b)``, (a, b) = ``w12(x)``."""

    def __init__(self, dims: int, hidden_dims: int, *, bias: bool = True) -> None:
        super().__init__()
        self.w12 = Linear(dims, 2 * hidden_dims, bias=bias)
        self.w3 = Linear(hidden_dims, dims, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., D) to (..., D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


# SwiGLU widths are rounded up to a multiple of this.
_SWIGLU_ALIGNMENT = {
    "swiglu": 8,
    "swiglu32": 32,
    "swiglu64": 64,
    "swiglu128": 128,
    "swiglufused": 8,
}
FFN_LAYERS = ("mlp", *_SWIGLU_ALIGNMENT)


def ffn_hidden_dims(name: str, dims: int, ratio: float) -> int:
    """Hidden width of the feed-forward ``name`` for a nominal ``ratio``.

    A SwiGLU has three matrices where an MLP has two, so its width is two thirds of the nominal one,
    rounded up to the alignment in the name. Both steps truncate in double precision, which decides
    the width for odd ratios.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in FFN_LAYERS:
        raise ValueError(f"ffn_layer is {name!r}; expected one of {FFN_LAYERS}")
    nominal = int(dims * ratio)
    if name == "mlp":
        return nominal
    align = _SWIGLU_ALIGNMENT[name]
    reduced = int(nominal * 2 / 3)
    return reduced + (-reduced) % align


def build_ffn(name: str, dims: int, ratio: float, *, bias: bool = True) -> nn.Module:
    """Build the feed-forward ``name``, one of :data:`FFN_LAYERS`."""
    layer = {"mlp": Mlp, "swiglufused": FusedSwiGLU}.get(name, SwiGLU)
    return layer(dims, ffn_hidden_dims(name, dims, ratio), bias=bias)
