"""Self-attention over packed sequences of different lengths."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .rope import rotate

RopeTables = tuple[Tensor, Tensor]
SequenceShape = tuple[int, int]  # (images, tokens per image)


class MaskedKBiasLinear(nn.Linear):
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
        return F.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class SelfAttention(nn.Module):
    """Multi-head self-attention within each image of a packed batch."""

    def __init__(
        self,
        dims: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        mask_k_bias: bool = False,
        proj_bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        if mask_k_bias and qkv_bias:
            self.qkv = MaskedKBiasLinear(dims, 3 * dims)
        else:
            self.qkv = nn.Linear(dims, 3 * dims, bias=qkv_bias)
        self.proj = nn.Linear(dims, dims, bias=proj_bias)

    def forward(self, x: Tensor, shapes: list[SequenceShape], tables: list[RopeTables]) -> Tensor:
        """Attend within each image.

        Args:
            x: packed tokens (sum of images * tokens, D).
            shapes: (images, tokens) of each packed entry.
            tables: RoPE sine and cosine of each entry.
        """
        qkv = self.qkv(x)
        sizes = [images * tokens for images, tokens in shapes]
        outputs = [
            self._attend(entry.view(*shape, 3, self.num_heads, -1), *table).flatten(0, 1)
            for entry, shape, table in zip(qkv.split(sizes), shapes, tables, strict=True)
        ]
        return self.proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs))

    def _attend(self, qkv: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        q, k, v = qkv.unbind(2)  # (B, T, heads, head_dims) each
        q, k = rotate(q, sin, cos), rotate(k, sin, cos)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
