"""The pre-norm transformer block with LayerScale and batch-subset stochastic depth."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import SelfAttention
from .feed_forward import build_ffn
from .norm import build_norm
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


def draw_subset(shapes: list[SequenceShape], drop_rate: float, device: torch.device) -> ImageSubset:
    """Draw the images that keep a residual branch; one permutation per entry.

    Of B images, ``max(int(B * (1 - drop_rate)), 1)`` are kept and their residual is scaled by
    B / kept. Unlike per-sample dropping, the dropped part is never computed.
    """
    indices, kept_shapes, scales = [], [], []
    for images, tokens in shapes:
        kept = max(int(images * (1 - drop_rate)), 1)
        indices.append(torch.randperm(images, device=device)[:kept])
        kept_shapes.append((kept, tokens))
        scales.append(images / kept)
    return ImageSubset(indices, kept_shapes, scales)


class Block(nn.Module):
    """``x + ls1(attn(norm1(x)))``, then ``x + ls2(mlp(norm2(x)))``, on packed tokens.

    Args:
        dims, num_heads: width and heads.
        ffn_layer, ffn_ratio, ffn_bias: see :func:`build_ffn`.
        qkv_bias, mask_k_bias, proj_bias, attn_backend: see :class:`SelfAttention`.
        layer_scale_init_value: 0 leaves LayerScale out.
        norm_layer: see :func:`build_norm`.
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
    ) -> None:
        super().__init__()

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
    ) -> Tensor:
        """Run the block.

        Args:
            x: packed tokens (sum of images * tokens, D).
            shapes: (images, tokens) of each packed entry.
            tables: RoPE sine and cosine of each entry; None without RoPE.
            attn_subset, ffn_subset: images that take part in each branch; None means all.
        """
        if attn_subset is None:
            x = _add_residual(x, self.attn(self.norm1(x), shapes, tables), self.ls1)
        else:
            kept = _gather(x, shapes, attn_subset)
            branch = self.ls1(self.attn(self.norm1(kept), attn_subset.shapes, tables))
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
