"""The mathematics of the ViT: tokens, blocks, final norms, initialisation."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model.weight_init import initialize
from torch import Tensor, nn

from dinov3_mm.models.layers.block import check_mode

from ..layers import (
    Block,
    ImageSubset,
    LayerNorm,
    LayerScale,
    MaskedKBiasLinear,
    Packing,
    PatchEmbed,
    RMSNorm,
    RotaryEmbedding2D,
    SequenceShape,
    build_norm,
    count_kept,
    draw_subset,
    draw_subsets,
    ffn_hidden_dims,
)
from .outputs import RecordedWeights

_SELF_INITIALISED = (PatchEmbed, RotaryEmbedding2D, LayerScale, LayerNorm, RMSNorm)
_BLOCK_SETTINGS = (
    "ffn_layer",
    "ffn_ratio",
    "ffn_bias",
    "qkv_bias",
    "mask_k_bias",
    "proj_bias",
    "layer_scale_init_value",
    "norm_layer",
)
# Inference on the CPU runs as many images at a time as keep the widest activation within this many
# bytes. The allocator keeps such buffers for the next layer; larger ones (glibc: from 32 MiB) are
# mapped afresh by the operating system each time, page fault by page fault.
_CHUNK_BYTES = 16 * 2**20

Grid = tuple[int, int]  # rows and columns of patches


class ViTTrunk(RecordedWeights):
    """Parameters and forward pass on packed tokens; :class:`ViTInterface` adds the public methods.

    The tokens of all images of all entries form one matrix (sum of B * T, D), so that norms and
    linears run once whatever the number of resolutions; only attention works per entry.

    A subclass makes its tokens in :meth:`_build_tokens` and hands them out in
    :meth:`_prefix_tokens`; what else it does differently, it overrides.

    Args:
        settings: every architecture value.
        rope: arguments of ``RotaryEmbedding2D``; None for a model without RoPE.
        drop_path_rate: share of the images that skip a residual branch in training.
        attn_backend: see ``SelfAttention``.
        with_cp: recompute blocks in the backward pass.
        init_cfg: MMEngine initialisation config.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        rope: dict[str, Any] | None,
        drop_path_rate: float,
        attn_backend: str,
        with_cp: bool | str,
        init_cfg: dict | list[dict] | None,
    ) -> None:
        super().__init__(init_cfg)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {drop_path_rate}; expected a value in [0, 1)")
        self.arch_settings = settings
        self.embed_dims = self.embed_dim = self.num_features = settings["embed_dims"]
        self.num_layers = self.n_blocks = settings["num_layers"]
        self.num_heads = settings["num_heads"]
        self.patch_size = settings["patch_size"]
        self.num_registers = settings["num_registers"]
        self.chunked_blocks = False
        self.drop_path_rate = drop_path_rate
        self.attn_backend = attn_backend
        self.with_cp = check_mode(with_cp)
        self._build_modules(rope)

    def _build_modules(self, rope: dict[str, Any] | None) -> None:
        """Register patch embedding, RoPE, blocks and norms."""
        settings, dims = self.arch_settings, self.embed_dims
        # Registration order is the key order of the official files and the order of random draws.
        self._build_tokens()
        self.patch_embed = PatchEmbed(settings["in_channels"], dims, self.patch_size)
        head_dims = dims // self.num_heads
        self.rope_embed = None if rope is None else RotaryEmbedding2D(head_dims, **rope)
        block_settings = {key: settings[key] for key in _BLOCK_SETTINGS if key in settings}
        self.blocks = nn.ModuleList(
            Block(
                dims,
                self.num_heads,
                attn_backend=self.attn_backend,
                with_cp=self.with_cp,
                **block_settings,
            )
            for _ in range(self.num_layers)
        )
        self._build_norms()
        self.head = nn.Identity()

    def _build_tokens(self) -> None:
        """Register the parameters ``cls_token``, ``mask_token`` and those of the subclass."""
        raise NotImplementedError

    def _build_norms(self) -> None:
        self.norm = build_norm(self.arch_settings["norm_layer"], self.embed_dims)
        self.cls_norm = self.local_cls_norm = None

    def _prefix_tokens(self) -> tuple[Tensor, Tensor | None]:
        """CLS (1, 1, D) and registers (1, R, D) as they enter the first block."""
        raise NotImplementedError

    def _add_positions(self, patches: Tensor, grid: Grid) -> Tensor:
        """Patches (B, N, D) with what marks their position before the first block."""
        return patches

    @torch.no_grad()
    def init_weights(self) -> None:
        """Write every parameter and buffer, then run ``init_cfg``.

        Linear weights and tokens are drawn with standard deviation 0.02 from torch's default
        generator, in the order of registration; mask token and biases are 0.
        """
        for parameter in self.parameters(recurse=False):
            if parameter is self.mask_token:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if isinstance(module, MaskedKBiasLinear):
                    module.reset_bias_mask()
            elif isinstance(module, _SELF_INITIALISED):
                module.init_weights()
        if self.init_cfg:
            initialize(self, self.init_cfg)
        self._is_init = True

    def _embed(
        self, images: list[Tensor], masks: list[Tensor | None]
    ) -> tuple[Tensor, list[SequenceShape], list[Grid]]:
        """Packed tokens, (B, T) of each entry, and its grid of patches."""
        self._check_inputs(images, masks)
        grids = [self.patch_embed.grid_size(batch) for batch in images]
        counts = [rows * columns for rows, columns in grids]
        patches = self.patch_embed(images)
        entries = patches.split([batch.shape[0] * n for batch, n in zip(images, counts)])
        prefix = self._prefix(patches.dtype, use_mask_token=all(mask is None for mask in masks))
        packed = []
        for batch, grid, entry, mask in zip(images, grids, entries, masks):
            entry = entry.view(batch.shape[0], grid[0] * grid[1], -1)
            if mask is not None:
                entry = torch.where(mask[..., None], self.mask_token.to(entry.dtype), entry)
            entry = self._add_positions(entry, grid)
            tokens = torch.cat((prefix.expand(batch.shape[0], -1, -1), entry), dim=1)
            packed.append(tokens.flatten(0, 1))
        shapes = [(batch.shape[0], prefix.shape[1] + n) for batch, n in zip(images, counts)]
        return packed[0] if len(packed) == 1 else torch.cat(packed), shapes, grids

    def _prefix(self, dtype: torch.dtype, *, use_mask_token: bool) -> Tensor:
        """CLS and register tokens (1, 1 + R, D)."""
        prefix, registers = self._prefix_tokens()
        if use_mask_token and torch.is_grad_enabled():
            # Distributed wrappers expect a gradient for every parameter, masks or not.
            prefix = prefix + 0 * self.mask_token
        if registers is not None:
            # Joined as matrices: the gradients then have the strides that DDP's buckets have.
            prefix = torch.cat((prefix[0], registers[0]))[None]
        return prefix.to(dtype)

    def _check_inputs(self, images: list[Tensor], masks: list[Tensor | None]) -> None:
        if not images or len(images) != len(masks):
            raise ValueError(
                f"got {len(images)} batches of images and {len(masks)} masks; expected at least "
                "one batch, and one mask (or None) for each"
            )
        channels, p = self.arch_settings["in_channels"], self.patch_size
        for batch, mask in zip(images, masks):
            shape = tuple(batch.shape)
            if len(shape) != 4 or shape[1] != channels or min(shape[2:]) < p:
                raise ValueError(
                    f"images have shape {shape}; expected (B, {channels}, H, W) with sides of at "
                    f"least one patch ({p} pixels)"
                )
            if not batch.is_floating_point():
                raise TypeError(
                    f"images have dtype {batch.dtype}; expected normalised floating-point images"
                )
            if mask is None:
                continue
            rows, columns = self.patch_embed.grid_size(batch)
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                given = getattr(mask, "dtype", type(mask).__name__)
                raise TypeError(f"a mask is {given}; expected a tensor of torch.bool, or None")
            if tuple(mask.shape) != (shape[0], rows * columns):
                raise ValueError(
                    f"the mask has shape {tuple(mask.shape)}; expected {(shape[0], rows * columns)}"
                    f" for images of shape {shape}: one value per patch"
                )

    def _run_blocks(
        self, x: Tensor, shapes: list[SequenceShape], grids: list[Grid], layers: Sequence[int]
    ) -> list[Tensor]:
        """Packed outputs of the blocks ``layers`` (ascending); later blocks are not run."""
        outputs = []
        rope = self.rope_embed
        plain_tables = None if rope is None else [rope(*grid) for grid in grids]
        packings: dict[bool, Packing] = {}  # by whether images skip the branch
        drawn: list[ImageSubset] | None = None
        for index in range(layers[-1] + 1):
            block = self.blocks[index]
            # All draws are made here, so that a block is a function of its arguments: recomputing
            # it under checkpointing needs no restored random state.
            tables = plain_tables
            if block.training and rope is not None and rope.augmented:
                tables = [rope(*grid, augment=True) for grid in grids]
            drops = block.training and self.drop_path_rate > 0
            subsets: Sequence[ImageSubset | None] = (None, None)
            if drops and x.device.type == "cpu":
                # In the order of the reference, block by block.
                subsets = [draw_subset(shapes, self.drop_path_rate, x.device) for _ in range(2)]
            elif drops:
                if drawn is None:
                    count = 2 * (layers[-1] + 1 - index)
                    drawn = draw_subsets(shapes, self.drop_path_rate, x.device, count)
                subsets = [drawn.pop(), drawn.pop()]
            if drops not in packings:
                kept = count_kept(shapes, self.drop_path_rate) if drops else shapes
                packings[drops] = block.attn.pack(x, kept)
            x = block(x, shapes, tables, *subsets, packings[drops])
            if index in layers:
                outputs.append(x)
        return outputs

    def _run_blocks_in_chunks(
        self, x: Tensor, shapes: list[SequenceShape], grids: list[Grid], layers: Sequence[int]
    ) -> list[Tensor]:
        """:meth:`_run_blocks`, on few images at a time where that is faster."""
        max_rows = self._max_chunk_rows(x)
        if max_rows is None or len(x) <= max_rows:
            return self._run_blocks(x, shapes, grids, layers)
        outputs = [torch.empty_like(x) for _ in layers]
        start = 0
        for (images, tokens), grid in zip(shapes, grids):
            step = max(1, max_rows // tokens)
            for first in range(0, images, step):
                count = min(step, images - first)
                rows = slice(start, start + count * tokens)
                parts = self._run_blocks(x[rows], [(count, tokens)], [grid], layers)
                for output, part in zip(outputs, parts):
                    output[rows] = part
                start = rows.stop
        return outputs

    def _max_chunk_rows(self, x: Tensor) -> int | None:
        """Tokens to run at a time, None for all. In training mode images depend on each other."""
        if self.training or torch.is_grad_enabled() or x.device.type != "cpu":
            return None
        if torch.compiler.is_compiling():
            return None
        settings = self.arch_settings
        hidden = ffn_hidden_dims(settings["ffn_layer"], self.embed_dims, settings["ffn_ratio"])
        return _CHUNK_BYTES // (max(hidden, 3 * self.embed_dims) * x.element_size())

    def _final_norm(self, x: Tensor, shapes: list[SequenceShape]) -> list[tuple[Tensor, Tensor]]:
        """Normed prefix (B, 1 + R, D) and patches (B, N, D) of each packed entry."""
        norms = [self._prefix_norm(index) for index in range(len(shapes))]
        if all(norm is self.norm for norm in norms):
            return [self._split_prefix(entry) for entry in unpack(self.norm(x), shapes)]
        pairs = [self._split_prefix(entry) for entry in unpack(x, shapes)]
        return [(norm(prefix), self.norm(patches)) for norm, (prefix, patches) in zip(norms, pairs)]

    def _prefix_norm(self, index: int) -> nn.Module:
        """Final norm of CLS and registers for entry ``index`` of a list."""
        if self.local_cls_norm is not None and self.local_cls_norm.training and index == 1:
            return self.local_cls_norm
        return self.norm if self.cls_norm is None else self.cls_norm

    def _split_prefix(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        num_prefix = 1 + self.num_registers
        return tokens.split((num_prefix, tokens.shape[1] - num_prefix), dim=1)


def unpack(x: Tensor, shapes: list[SequenceShape]) -> list[Tensor]:
    """Views (B, T, D) of the packed entries."""
    parts = x.split([images * tokens for images, tokens in shapes])
    return [part.view(*shape, -1) for part, shape in zip(parts, shapes)]
