"""Rotation of queries and keys by the RoPE tables."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .rope import RopeTables

SequenceShape = tuple[int, int]  # (images, tokens per image)
QueryKeyValue = tuple[Tensor, Tensor, Tensor]


def rotate_packed_qkv(
    qkv: Tensor,
    num_heads: int,
    shapes: list[SequenceShape],
    tables: list[RopeTables],
) -> list[QueryKeyValue]:
    """Split packed projections into entries and rotate their queries and keys.

    Channel i of a head is rotated together with channel i + head_dims / 2. The last N tokens of an
    image, where N is the length of the tables, are rotated; the leading ones (CLS and registers)
    keep their place. All queries and keys pass through the dtype of the tables.

    Args:
        qkv: packed projections (sum of images * tokens, 3 * D).
        num_heads: heads that share the D channels.
        shapes: (images, tokens) of each packed entry.
        tables: sine and cosine (N, head_dims / 2) of each entry.

    Returns:
        Queries, keys and values of each entry, (images, heads, tokens, head_dims) each, in the
        dtype of ``qkv``.
    """
    if qkv.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        flat_tables = [table for pair in tables for table in pair]
        flat = _RotatePackedQKV.apply(qkv, num_heads, shapes, *flat_tables)
        return [flat[i : i + 3] for i in range(0, len(flat), 3)]
    return [
        _rotate_entry(entry, *pair)
        for entry, pair in zip(_split_heads(qkv, num_heads, shapes), tables, strict=True)
    ]


def split_packed_qkv(
    qkv: Tensor, num_heads: int, shapes: list[SequenceShape]
) -> list[QueryKeyValue]:
    """:func:`rotate_packed_qkv` without a rotation, for models without RoPE."""
    return [entry.permute(2, 0, 3, 1, 4).unbind() for entry in _split_heads(qkv, num_heads, shapes)]


class _RotatePackedQKV(torch.autograd.Function):
    """Saves only the tables, and writes the gradients of q, k and v straight into one matrix."""

    @staticmethod
    def forward(
        ctx,
        qkv: Tensor,
        num_heads: int,
        shapes: list[SequenceShape],
        *flat_tables: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*flat_tables)
        ctx.num_heads, ctx.shapes = num_heads, shapes
        ctx.qkv_shape, ctx.qkv_dtype = qkv.shape, qkv.dtype
        entries = zip(_split_heads(qkv, num_heads, shapes), flat_tables[::2], flat_tables[1::2])
        return tuple(t for entry, *pair in entries for t in _rotate_entry(entry, *pair))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat_tables = ctx.saved_tensors
        grad_qkv = grads[0].new_empty(ctx.qkv_shape, dtype=ctx.qkv_dtype)
        for index, entry in enumerate(_split_heads(grad_qkv, ctx.num_heads, ctx.shapes)):
            grad_q, grad_k, grad_v = (g.transpose(1, 2) for g in grads[3 * index : 3 * index + 3])
            # The transpose of a rotation is the rotation by the opposite angle.
            inverse = -flat_tables[2 * index], flat_tables[2 * index + 1]
            _rotate_into(entry[:, :, 0], grad_q, *inverse)
            _rotate_into(entry[:, :, 1], grad_k, *inverse)
            entry[:, :, 2].copy_(grad_v)
        return grad_qkv, None, None, *[None] * len(flat_tables)


def _split_heads(qkv: Tensor, num_heads: int, shapes: list[SequenceShape]) -> list[Tensor]:
    """Views (images, tokens, 3, heads, head_dims) of the packed entries."""
    sizes = [images * tokens for images, tokens in shapes]
    return [
        entry.view(*shape, 3, num_heads, -1)
        for entry, shape in zip(qkv.split(sizes), shapes, strict=True)
    ]


def _rotate_entry(qkv: Tensor, sin: Tensor, cos: Tensor) -> QueryKeyValue:
    """Queries, keys and values of one entry, (images, heads, tokens, head_dims) each."""
    query_key = qkv[:, :, :2]
    if torch.compiler.is_compiling():
        rotated = _rotate(query_key, sin, cos).to(qkv.dtype)
    elif query_key.dtype == sin.dtype:
        rotated = torch.empty_like(query_key, memory_format=torch.contiguous_format)
        _rotate_into(rotated, query_key, sin, cos)
    else:
        rotated = _rotate_cast(query_key, sin, cos).to(qkv.dtype)
    q, k = rotated.transpose(1, 3).unbind(2)
    return q, k, qkv[:, :, 2].transpose(1, 2)


def _rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotation of ``x`` (images, tokens, ..., head_dims) in plain arithmetic, for a compiler."""
    num_prefix, sin, cos = _align(x, sin, cos)
    y = x.to(sin.dtype)
    first, second = y[:, num_prefix:].chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((y[:, :num_prefix], rotated), dim=1)


def _rotate_into(out: Tensor, x: Tensor, sin: Tensor, cos: Tensor) -> None:
    """Write the rotation of ``x`` (images, tokens, ..., head_dims) to ``out``."""
    if not x.dtype == sin.dtype == out.dtype:
        out.copy_(_rotate_cast(x, sin, cos))
        return
    num_prefix, sin, cos = _align(x, sin, cos)
    out[:, :num_prefix] = x[:, :num_prefix]
    first, second = x[:, num_prefix:].chunk(2, dim=-1)
    out_first, out_second = out[:, num_prefix:].chunk(2, dim=-1)
    _add_product_(torch.mul(first, cos, out=out_first), second, sin, -1)
    _add_product_(torch.mul(second, cos, out=out_second), first, sin, 1)


def _rotate_cast(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotation of ``x`` (images, tokens, ..., head_dims) in the dtype of the tables."""
    num_prefix, sin, cos = _align(x, sin, cos)
    x = x.to(sin.dtype, copy=True, memory_format=torch.contiguous_format)
    first, second = x[:, num_prefix:].chunk(2, dim=-1)
    product = first * sin
    _add_product_(first.mul_(cos), second, sin, -1)
    second.mul_(cos).add_(product)
    return x


def _add_product_(out: Tensor, x: Tensor, table: Tensor, sign: int) -> None:
    if out.dtype == torch.float32:
        out.addcmul_(x, table, value=sign)
    else:
        # A 16-bit RoPE rounds each product; a fused update would not.
        out.add_(x * table, alpha=sign)


def _align(x: Tensor, sin: Tensor, cos: Tensor) -> tuple[int, Tensor, Tensor]:
    """Number of leading tokens without a position, and tables that broadcast against the rest."""
    num_patches, half_dims = sin.shape
    shape = (num_patches, *[1] * (x.dim() - 3), half_dims)
    return x.shape[1] - num_patches, sin.view(shape), cos.view(shape)
