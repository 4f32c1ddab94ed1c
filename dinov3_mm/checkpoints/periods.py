"""RoPE periods for sources that store none, or in place of the stored ones.

The released official files hold periods that were rounded to bf16; Hugging Face and timm compute
exact ones. With equal weights the features differ by a few 1e-3, so the choice is the user's.
"""

import torch
from torch import Tensor

from ..models.layers import RotaryEmbedding2D
from .conversion import ConversionRequest

PERIODS_KEY = "rope_embed.periods"


def made_up_periods(
    head_dims: int, request: ConversionRequest, base: float | None = None
) -> tuple[Tensor, str]:
    """Periods (head_dims / 4,) in fp32 for a source that stores none, and a note for the report.

    Args:
        head_dims: channels of one head.
        request: ``periods='file'`` rounds to bf16 as the released files do, 'exact' does not.
        base: RoPE base that the source states, if it does.
    """
    dtype, manner = ("fp32", "exact") if request.periods == "exact" else ("bf16", "rounded to bf16")
    rope = _formula(request) if base is None else {"base": float(base)}
    values = RotaryEmbedding2D(head_dims, dtype=dtype, **rope).periods.float()
    return values, f"periods made up ({manner})"


def recomputed_periods(stored: Tensor, request: ConversionRequest) -> Tensor:
    """Exact fp32 periods in place of stored ones that are the same up to bf16 rounding.

    Raises:
        ValueError: If the stored periods follow another formula.
    """
    rope = _formula(request)
    exact, rounded = (
        RotaryEmbedding2D(4 * stored.numel(), dtype=dtype, **rope).periods.float()
        for dtype in ("fp32", "bf16")
    )
    stored = stored.float()
    if not (torch.equal(stored, rounded) or torch.allclose(stored, exact, rtol=1e-5, atol=0)):
        raise ValueError(
            f"periods='exact' does not fit this file: its RoPE periods {stored.tolist()[:4]}... "
            f"are not those of {rope}; use periods='file' to take them as stored"
        )
    return exact


def _formula(request: ConversionRequest) -> dict[str, float | None]:
    """Arguments of the formula: those of the wanted architecture, else base 100."""
    arch = request.arch
    if arch.get("rope_min_period") is not None:
        ends = {"min_period": arch["rope_min_period"], "max_period": arch["rope_max_period"]}
        return {"base": None, **ends}
    return {"base": float(arch.get("rope_base") or 100.0)}
