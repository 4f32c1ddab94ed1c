"""The pre-norm transformer block and its parts: norm, feed-forward, layer scale, stochastic depth,
embeddings of patches and positions, and activation checkpointing.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from .attention import Linear, Packing, SelfAttention
from .rope import RopeTables, SequenceShape

# --- Norms: fp32 statistics, an output in the dtype of the input ---


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


# --- Feed-forward: GELU MLP and SwiGLU ---


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


# --- Patches and positions ---


class PatchEmbed(nn.Module):
    """Linear embedding of non-overlapping square patches.

    The weight has the layout of a convolution (D, C, p, p), but it is applied as a matrix product.

    Args:
        in_channels: image channels C.
        dims: output channels D.
        patch_size: side p in pixels.
    """

    def __init__(self, in_channels: int, dims: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dims, patch_size, patch_size)

    def grid_size(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of ``image`` (..., H, W); trailing pixels do not count."""
        return image.shape[-2] // self.patch_size, image.shape[-1] // self.patch_size

    def forward(self, images: list[Tensor]) -> Tensor:
        """Embed the patches of batches (B, C, H, W) into one matrix (sum of B * h * w, D).

        Rows are ordered by entry, image, patch row, patch column.
        """
        weight = self.proj.weight
        pixels = [self._unfold(batch.to(weight.dtype)) for batch in images]
        pixels = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
        return F.linear(pixels, weight.flatten(1), self.proj.bias)

    def _unfold(self, batch: Tensor) -> Tensor:
        p = self.patch_size
        images, channels = batch.shape[:2]
        rows, columns = self.grid_size(batch)
        batch = batch[..., : rows * p, : columns * p]
        batch = batch.reshape(images, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        return batch.reshape(images * rows * columns, channels * p * p)

    def init_weights(self) -> None:
        """Draw weight and bias from U(-1/sqrt(C p^2), 1/sqrt(C p^2))."""
        bound = 1 / math.sqrt(self.proj.weight[0].numel())
        nn.init.uniform_(self.proj.weight, -bound, bound)
        nn.init.uniform_(self.proj.bias, -bound, bound)


def resample_position_embedding(
    embedding: Tensor, grid: tuple[int, int], *, offset: float = 0.0, antialias: bool = False
) -> Tensor:
    """Bicubic resampling of a position embedding; at its own size it is returned as it is.

    Without an offset the grid is resampled to the wanted size. With one, each side is scaled by
    ``(wanted + offset) / side`` and the sampling points follow that factor, not the ratio of the
    sizes: the first DINOv2 models were trained and evaluated so, with 0.1.

    Args:
        embedding: (1, side * side, D), row by row.
        grid: rows and columns that are wanted.
        offset: see above.
        antialias: low-pass filter when a side shrinks.

    Returns:
        (1, rows * columns, D), in fp32 if it was resampled from a narrower type.

    Raises:
        ValueError: if the offset is so large that another size results.
    """
    side = math.isqrt(embedding.shape[1])
    if tuple(grid) == (side, side):
        return embedding
    wide = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
    image = wide.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if offset:
        target = {"scale_factor": tuple((length + offset) / side for length in grid)}
    else:
        target = {"size": tuple(grid)}
    resampled = F.interpolate(image, mode="bicubic", antialias=antialias, **target)
    if tuple(resampled.shape[2:]) != tuple(grid):
        raise ValueError(
            f"an offset of {offset} resamples the position embedding to "
            f"{tuple(resampled.shape[2:])} instead of {tuple(grid)}; expected 0 or about 0.1"
        )
    return resampled.flatten(2).transpose(1, 2)


# --- Recomputation that keeps what is expensive ---


MODES = (False, True, "selective")

_ATEN = torch.ops.aten
# Matrix products and attention: nearly all of the arithmetic, a third of the activations.
_KEPT = frozenset(
    getattr(_ATEN, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "_scaled_mm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_flash_attention_forward",
        "_efficient_attention_forward",
    )
)
# Operators of torch's variable-length attention and of xformers, which register when imported.
_KEPT_NAMES = (
    "torch_attn::_varlen_attn",
    "xformers_flash::flash_fwd",
    "xformers_flash3::flash_fwd",
)


def run_recomputed(mode: bool | str, function, *inputs):
    """Run ``function(*inputs)`` and recompute its activations in the backward pass.

    To be called within what is compiled: the compiler then knows what is to be kept, and plans the
    backward pass accordingly. Around compiled code it would see that code's own operators.

    Args:
        mode: True keeps the inputs only; 'selective' also keeps the results of matrix products and
            attention, and recomputes norms, activations and elementwise operations.
        function: must draw no random numbers.
        inputs: its arguments.
    """
    context = {}
    if mode == "selective":
        context = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **context)


def check_mode(mode: bool | str) -> bool | str:
    """Return ``mode`` if it is one of :data:`MODES`, else raise a ``ValueError``."""
    if mode not in MODES:
        raise ValueError(f"with_cp is {mode!r}; expected one of {MODES}")
    return mode


def _policy(_context, operator, *_args, **_kwargs) -> CheckpointPolicy:
    if operator in _KEPT or operator.name() in _KEPT_NAMES:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# --- The block: LayerScale, stochastic depth by subsets of the batch ---


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
