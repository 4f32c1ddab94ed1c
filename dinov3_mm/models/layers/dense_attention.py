"""Attention that keeps its probabilities, for short 16-bit sequences in training on a CPU.

Torch's 16-bit attention on the CPU is slow in its backward pass: three times slower than matrix
products at 200 tokens, ten times at 40, because it does not use the processor's 16-bit products.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# The probabilities of longer sequences would take more memory than the rest of a block.
MAX_TOKENS = 256


def prefers_dense_attention(query: Tensor) -> bool:
    """Whether :func:`dense_attention` is the faster one for ``query`` (B, heads, T, head_dims)."""
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.requires_grad
        and torch.is_grad_enabled()
        and query.shape[2] <= MAX_TOKENS
        and not torch.compiler.is_compiling()
    )


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(head_dims)) v`` with fp32 scores and 16-bit probabilities.

    Args:
        query, key, value: (B, heads, T, head_dims), 16-bit.

    Returns:
        (B, heads, T, head_dims) in the dtype of ``value``. The rounding error, forward and backward
        is of the size of that of torch's fused attention.
    """
    return _DenseAttention.apply(query, key, value)


class _DenseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = query.shape[-1] ** -0.5
        # Autocast would round the scores to 16 bits.
        with torch.autocast(query.device.type, enabled=False):
            scores = (query.float() * scale) @ key.float().transpose(-1, -2)
            probs = scores.softmax(-1).to(value.dtype)
        ctx.save_for_backward(query, key, value, probs)
        return probs @ value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, probs = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        grad_probs = grad @ value.transpose(-1, -2)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
        return (
            (grad_scores @ key).mul_(scale),
            (grad_scores.transpose(-1, -2) @ query).mul_(scale),
            probs.transpose(-1, -2) @ grad,
        )
