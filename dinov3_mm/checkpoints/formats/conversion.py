"""RoPE periods for sources that store none, or in place of the stored ones.

The released official files hold periods that were rounded to bf16; Hugging Face and timm compute
exact ones. With equal weights the features differ by a few 1e-3, so the choice is the user's.

The precision in which RoPE is computed is another matter. The released models compute in fp32; the
reference's trainer always computes in bf16, whatever its config says, and its checkpoints hold
their periods in bf16 beside the projection heads. That, too, changes features by a few 1e-3.
"""

import torch
from torch import Tensor, nn

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


def trained_rope_dtype(stored: Tensor | None, *, has_heads: bool) -> str | None:
    """``'bf16'`` where the tensors show that RoPE was computed so in training, else None.

    Released files store bf16 periods too, but no projection heads.

    Args:
        stored: the periods as stored.
        has_heads: whether projection heads lie beside the backbone.
    """
    is_narrow = stored is not None and stored.dtype == torch.bfloat16
    return "bf16" if is_narrow and has_heads else None


def rope_note(stored: Tensor | None, trained: str | None, module: nn.Module) -> list[str]:
    """What a load line says about the precision of RoPE: nothing unless periods came in bf16.

    Args:
        stored: the periods that are loaded.
        trained: see :func:`trained_rope_dtype`.
        module: the backbone.
    """
    rope = getattr(module, "rope_embed", None)
    if rope is None or stored is None or stored.dtype != torch.bfloat16:
        return []
    here = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[rope.dtype]
    if trained is None:
        as_released = "as" if here == "fp32" else "not in fp32 as"
        return [f"RoPE computed in {here}, {as_released} in the released models (rope_dtype)"]
    if trained == here:
        return [f"RoPE computed in {here} as in the training of these weights (rope_dtype)"]
    return [
        f"RoPE computed in {here}, but in {trained} in the training of these weights, which "
        f"changes features by a few 1e-3: rope_dtype={trained!r} on the backbone computes it as "
        "there"
    ]


def _formula(request: ConversionRequest) -> dict[str, float | None]:
    """Arguments of the formula: those of the wanted architecture, else base 100."""
    arch = request.arch
    if arch.get("rope_min_period") is not None:
        ends = {"min_period": arch["rope_min_period"], "max_period": arch["rope_max_period"]}
        return {"base": None, **ends}
    return {"base": float(arch.get("rope_base") or 100.0)}
