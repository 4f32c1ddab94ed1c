"""Self-attention over packed sequences of different lengths."""

import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dense_attention import dense_attention, prefers_dense_attention
from .linear import Linear
from .rope import RopeTables
from .rotation import QueryKeyValue, SequenceShape, rotate_packed_qkv, split_packed_qkv

ATTN_BACKENDS = ("auto", "sdpa", "xformers")


class MaskedKBiasLinear(Linear):
    """The fused q, k, v projection with a bias that is switched off for k.

    The effective bias is ``bias * bias_mask``; the mask (1 for q and v, 0 for k) is a buffer, so
    that a checkpoint decides: the released files hold zeros throughout.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=True)
        self.register_buffer("bias_mask", torch.ones(out_features))
        self.reset_bias_mask()

    @torch.no_grad()
    def reset_bias_mask(self) -> None:
        """Write 1, 0, 1 to the thirds of the mask: q and v keep their bias, k loses it."""
        third = self.out_features // 3
        self.bias_mask.fill_(1)
        self.bias_mask[third : 2 * third].fill_(0)

    def forward(self, x: Tensor) -> Tensor:
        """Project ``x`` (..., D) to (..., 3 D)."""
        return self.product(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class SelfAttention(nn.Module):
    """Multi-head self-attention within each image of a packed batch.

    Args:
        dims, num_heads: width and heads.
        qkv_bias, proj_bias: biases of the two projections.
        mask_k_bias: see :class:`MaskedKBiasLinear`; without ``qkv_bias`` there is nothing to mask.
        backend: 'sdpa' calls torch's attention once per entry; 'xformers' makes one call with a
            block-diagonal mask; 'auto' takes xformers for several entries on CUDA if it is there.

    Raises:
        ImportError: if the backend is 'xformers' and it is not installed.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        mask_k_bias: bool = False,
        proj_bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if backend not in ATTN_BACKENDS:
            raise ValueError(f"attn_backend is {backend!r}; expected one of {ATTN_BACKENDS}")
        self.num_heads = num_heads
        self.backend = backend
        self.has_xformers = importlib.util.find_spec("xformers") is not None
        if backend == "xformers" and not self.has_xformers:
            raise ImportError(
                "attn_backend is 'xformers', which is not installed; install the extra "
                "'dinov3_mm[gpu]' or use attn_backend='auto'"
            )
        if mask_k_bias and qkv_bias:
            self.qkv = MaskedKBiasLinear(dims, 3 * dims)
        else:
            self.qkv = Linear(dims, 3 * dims, bias=qkv_bias)
        self.proj = Linear(dims, dims, bias=proj_bias)

    def forward(
        self, x: Tensor, shapes: list[SequenceShape], tables: list[RopeTables] | None
    ) -> Tensor:
        """Attend within each image.

        Args:
            x: packed tokens (sum of images * tokens, D).
            shapes: (images, tokens) of each packed entry.
            tables: RoPE sine and cosine of each entry; None for no rotation.
        """
        qkv = self.qkv(x)
        if tables is None:
            entries = split_packed_qkv(qkv, self.num_heads, shapes)
        else:
            entries = rotate_packed_qkv(qkv, self.num_heads, shapes, tables)
        attend = attend_block_diagonal if self._use_xformers(x, shapes) else attend_per_entry
        return self.proj(attend(entries))

    def _use_xformers(self, x: Tensor, shapes: list[SequenceShape]) -> bool:
        if self.backend == "auto":
            return self.has_xformers and x.is_cuda and len(shapes) > 1
        return self.backend == "xformers"


def attend_per_entry(entries: list[QueryKeyValue]) -> Tensor:
    """Attention for each entry in turn; returns packed tokens (sum of images * tokens, D)."""
    outputs = []
    for query, key, value in entries:
        dense = prefers_dense_attention(query)
        attend = dense_attention if dense else F.scaled_dot_product_attention
        outputs.append(attend(query, key, value).transpose(1, 2).flatten(0, 1).flatten(1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend_block_diagonal(entries: list[QueryKeyValue]) -> Tensor:
    """One xformers call for all entries; returns packed tokens (sum of images * tokens, D)."""
    from xformers.ops import memory_efficient_attention

    shapes = tuple((query.shape[0], query.shape[2]) for query, _, _ in entries)
    packed = [
        torch.cat([t.transpose(1, 2).flatten(0, 1) for t in parts])[None] for parts in zip(*entries)
    ]  # (1, tokens of all images, heads, head_dims)
    mask = _block_diagonal_mask(shapes, packed[0].device)
    return memory_efficient_attention(*packed, attn_bias=mask)[0].flatten(1)


@lru_cache(maxsize=8)
def _block_diagonal_mask(shapes: tuple[SequenceShape, ...], device: torch.device) -> Any:
    """The mask of all blocks and steps with the same shapes: building one copies to the device."""
    from xformers.ops import fmha

    lengths = [tokens for images, tokens in shapes for _ in range(images)]
    return fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=device)
