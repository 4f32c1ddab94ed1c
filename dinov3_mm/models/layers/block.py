"""The pre-norm transformer block with LayerScale and batch-subset stochastic depth."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import Packing, SelfAttention
from .feed_forward import build_ffn
from .norm import build_norm
from .recompute import run_recomputed
from .rope import RopeTables
from .rotation import SequenceShape


class LayerScale(nn.Module):
    """Per-channel factor ``gamma`` (D) on a residual branch."""

    def __init__(self, dims: int, init_value: float) -> None:
        super().__init__()
        self.init_value = init_value
        self.gamma = nn.Parameter(torch.full((dims,), init_value))

    def init_weights(self) -> None:
        """Reset every factor to the initial value."""
        nn.init.constant_(self.gamma, self.init_value)

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``x`` (..., D)."""
        return x * self.gamma.to(x.dtype)

    def add_residual(self, x: Tensor, branch: Tensor) -> Tensor:
        """``x`` plus the scaled ``branch``, in one pass."""
        return torch.addcmul(x, branch, self.gamma.to(x.dtype))


class ImageSubset(NamedTuple):
    """The images of each packed entry for which a residual branch is computed."""

    indices: list[Tensor]
    shapes: list[SequenceShape]
    scales: list[float]


def count_kept(shapes: list[SequenceShape], drop_rate: float) -> list[SequenceShape]:
    """(images, tokens) of each entry that take part in a residual branch.

    Of B images, ``max(int(B * (1 - drop_rate)), 1)``.
    """
    return [(max(int(images * (1 - drop_rate)), 1), tokens) for images, tokens in shapes]


def draw_subset(shapes: list[SequenceShape], drop_rate: float, device: torch.device) -> ImageSubset:
    """Draw the images that keep a residual branch; one permutation per entry.

    Of B images, ``max(int(B * (1 - drop_rate)), 1)`` are kept and their residual is scaled by
    B / kept. Unlike per-sample dropping, the dropped part is never computed.
    """
    kept = count_kept(shapes, drop_rate)
    indices = [
        torch.randperm(images, device=device)[:count]
        for (images, _), (count, _) in zip(shapes, kept)
    ]
    return _subset(indices, shapes, kept)


def draw_subsets(
    shapes: list[SequenceShape], drop_rate: float, device: torch.device, count: int
) -> list[ImageSubset]:
    """Draw as many subsets as :func:`draw_subset` would in ``count`` calls, in one.

    The ranks of independent uniform numbers are a uniform permutation. One tensor of random numbers
    and a sort for each entry take the place of a permutation, which is a few kernels on a GPU, for
    every branch of every block.
    """
    kept = count_kept(shapes, drop_rate)
    total = sum(images for images, _ in shapes)
    # Of 64 bits: equal numbers, whose order would not be random, do not occur in practice.
    keys = torch.empty(count, total, dtype=torch.int64, device=device).random_()
    parts = keys.split([images for images, _ in shapes], dim=1)
    orders = [part.argsort(dim=1)[:, :number] for part, (number, _) in zip(parts, kept)]
    return [_subset(list(indices), shapes, kept) for indices in zip(*orders)]


def _subset(
    indices: list[Tensor], shapes: list[SequenceShape], kept: list[SequenceShape]
) -> ImageSubset:
    scales = [images / count for (images, _), (count, _) in zip(shapes, kept)]
    return ImageSubset(indices, kept, scales)


class Block(nn.Module):
    """``x + ls1(attn(norm1(x)))``, then ``x + ls2(mlp(norm2(x)))``, on packed tokens.

    Args:
        dims, num_heads: width and heads.
        ffn_layer, ffn_ratio, ffn_bias: see :func:`build_ffn`.
        qkv_bias, mask_k_bias, proj_bias, attn_backend: see :class:`SelfAttention`.
        layer_scale_init_value: 0 leaves LayerScale out.
        norm_layer: see :func:`build_norm`.
        with_cp: one of ``recompute.MODES``: what the backward pass computes again.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        *,
        ffn_layer: str = "mlp",
        ffn_ratio: float = 4.0,
        ffn_bias: bool = True,
        qkv_bias: bool = True,
        mask_k_bias: bool = False,
        proj_bias: bool = True,
        layer_scale_init_value: float = 0.0,
        norm_layer: str = "layernorm",
        attn_backend: str = "auto",
        with_cp: bool | str = False,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp

        def layer_scale() -> nn.Module:
            if not layer_scale_init_value:
                return nn.Identity()
            return LayerScale(dims, layer_scale_init_value)

        self.norm1 = build_norm(norm_layer, dims)
        self.attn = SelfAttention(
            dims,
            num_heads,
            qkv_bias=qkv_bias,
            mask_k_bias=mask_k_bias,
            proj_bias=proj_bias,
            backend=attn_backend,
        )
        self.ls1 = layer_scale()
        self.norm2 = build_norm(norm_layer, dims)
        self.mlp = build_ffn(ffn_layer, dims, ffn_ratio, bias=ffn_bias)
        self.ls2 = layer_scale()

    def forward(
        self,
        x: Tensor,
        shapes: list[SequenceShape],
        tables: list[RopeTables] | None,
        attn_subset: ImageSubset | None = None,
        ffn_subset: ImageSubset | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            x: packed tokens (sum of images * tokens, D).
            shapes: (images, tokens) of each packed entry.
            tables: RoPE sine and cosine of each entry; None without RoPE.
            attn_subset, ffn_subset: images that take part in each branch; None means all.
            packing: of the images that attend, see :meth:`SelfAttention.pack`; None makes one.
        """
        inputs = (x, shapes, tables, attn_subset, ffn_subset, packing)
        if self.with_cp and torch.is_grad_enabled():
            # Within the block, so that a compiler of the block sees what is to be kept.
            return run_recomputed(self.with_cp, self._add_branches, *inputs)
        return self._add_branches(*inputs)

    def _add_branches(
        self,
        x: Tensor,
        shapes: list[SequenceShape],
        tables: list[RopeTables] | None,
        attn_subset: ImageSubset | None,
        ffn_subset: ImageSubset | None,
        packing: Packing | None,
    ) -> Tensor:
        if attn_subset is None:
            branch = self.attn(self.norm1(x), shapes, tables, packing)
            x = _add_residual(x, branch, self.ls1)
        else:
            kept = _gather(x, shapes, attn_subset)
            branch = self.attn(self.norm1(kept), attn_subset.shapes, tables, packing)
            branch = self.ls1(branch)
            x = _add_to_subset(x, branch, shapes, attn_subset)
        if ffn_subset is None:
            return _add_residual(x, self.mlp(self.norm2(x)), self.ls2)
        branch = self.ls2(self.mlp(self.norm2(_gather(x, shapes, ffn_subset))))
        return _add_to_subset(x, branch, shapes, ffn_subset)


def _add_residual(x: Tensor, branch: Tensor, layer_scale: nn.Module) -> Tensor:
    if isinstance(layer_scale, LayerScale):
        return layer_scale.add_residual(x, branch)
    return x + branch


def _split_images(x: Tensor, shapes: list[SequenceShape]) -> list[Tensor]:
    """Views (images, tokens * D) of the packed entries."""
    parts = x.split([images * tokens for images, tokens in shapes])
    return [part.view(images, -1) for part, (images, _) in zip(parts, shapes)]


def _gather(x: Tensor, shapes: list[SequenceShape], subset: ImageSubset) -> Tensor:
    entries = zip(_split_images(x, shapes), subset.indices)
    return torch.cat([images[index].view(-1, x.shape[-1]) for images, index in entries])


def _add_to_subset(
    x: Tensor, branch: Tensor, shapes: list[SequenceShape], subset: ImageSubset
) -> Tensor:
    entries = zip(
        _split_images(x, shapes),
        _split_images(branch, subset.shapes),
        subset.indices,
        subset.scales,
    )
    return torch.cat(
        [
            images.index_add(0, index, part, alpha=scale).view(-1, x.shape[-1])
            for images, part, index, scale in entries
        ]
    )
