"""DINOv3 Vision Transformer (paper section 3.2)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mmengine.model import BaseModule
from mmengine.model.weight_init import initialize
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import (
    Block,
    LayerNorm,
    LayerScale,
    MaskedKBiasLinear,
    PatchEmbed,
    RMSNorm,
    RotaryEmbedding2D,
    SequenceShape,
    build_norm,
    draw_subset,
)
from .variants import resolve_vit_arch

_SELF_INITIALISED = (PatchEmbed, RotaryEmbedding2D, LayerScale, LayerNorm, RMSNorm)
OUT_TYPES = ("featmap", "cls_token", "avg_featmap", "raw", "featmap+cls")


class TokenOutput(NamedTuple):
    """Tokens of one batch of images after the last block.

    Attributes:
        cls: (B, D), after the final norm.
        registers: (B, R, D), after the final norm.
        patches: (B, N, D), after the final norm, row by row.
        prenorm: (B, 1 + R + N, D), all tokens before the final norm.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor
    prenorm: Tensor


@MODELS.register_module()
class DINOv3ViT(BaseModule):
    """Vision Transformer with registers, axial RoPE, LayerScale and a masked K bias.

    Parameters and buffers carry the names of the official checkpoints. Arguments from
    ``patch_size`` to ``untie_global_and_local_cls_norm`` and those named ``rope_`` belong to the
    architecture; None takes the value from ``arch``.

    Args:
        arch: name in :data:`~dinov3_mm.models.backbones.variants.ARCHITECTURES`, or a dict with
            ``embed_dims``, ``num_layers``, ``num_heads`` and any architecture argument below.
        patch_size: side of a patch in pixels.
        in_channels: image channels.
        num_registers: register (storage) tokens.
        ffn_layer: 'mlp', 'swiglu', 'swiglu32', 'swiglu64' or 'swiglu128'.
        ffn_ratio: nominal hidden width over ``embed_dims``.
        qkv_bias, ffn_bias, proj_bias: biases of the linears.
        mask_k_bias: multiply the qkv bias by a buffer that is 0 for k.
        layer_scale_init_value: initial LayerScale; 0 leaves LayerScale out.
        norm_layer: 'layernorm' (eps 1e-6), 'layernormbf16' (eps 1e-5) or 'rmsnorm' (eps 1e-5).
        untie_cls_and_patch_norms: separate final norm for CLS and registers.
        untie_global_and_local_cls_norm: separate final norm for CLS and registers of local crops
            (entry 1 of a list) in training mode.
        rope_base: base of the RoPE periods; excludes the next two.
        rope_min_period, rope_max_period: range of the RoPE periods.
        rope_normalize_coords: 'separate', 'min' or 'max'.
        rope_shift_coords, rope_jitter_coords, rope_rescale_coords: strength of the coordinate
            augmentation in training mode, drawn per block and entry; None is off.
        rope_dtype: dtype of tables and rotation: 'fp32', 'fp16' or 'bf16'.
        drop_path_rate: share of the images that skip a residual branch in training, equal in all
            blocks.
        out_indices: blocks whose output :meth:`forward` returns, ascending; negative from the end.
        out_type: what :meth:`forward` returns per block: 'featmap' (B, D, h, w), 'cls_token'
            (B, D), 'avg_featmap' (B, D), 'raw' (B, 1 + R + N, D) or 'featmap+cls', a pair.
        final_norm: apply the final norm to every output of :meth:`forward`.
        frozen_stages: 0 freezes tokens and patch embedding, k also the first k blocks, the number
            of blocks everything. Frozen parts stay in eval mode. -1 freezes nothing.
        attn_backend: 'auto', 'sdpa' or 'xformers'.
        with_cp: recompute each block in the backward pass instead of storing its activations.
        init_cfg: MMEngine initialisation config, run after the model's own initialisation.

    Raises:
        ValueError: if an argument is unknown or does not fit the others.
    """

    def __init__(
        self,
        arch: str | dict[str, Any] = "base",
        *,
        patch_size: int | None = None,
        in_channels: int | None = None,
        num_registers: int | None = None,
        ffn_layer: str | None = None,
        ffn_ratio: float | None = None,
        qkv_bias: bool | None = None,
        mask_k_bias: bool | None = None,
        ffn_bias: bool | None = None,
        proj_bias: bool | None = None,
        layer_scale_init_value: float | None = None,
        norm_layer: str | None = None,
        untie_cls_and_patch_norms: bool | None = None,
        untie_global_and_local_cls_norm: bool | None = None,
        rope_base: float | None = None,
        rope_min_period: float | None = None,
        rope_max_period: float | None = None,
        rope_normalize_coords: str | None = None,
        rope_shift_coords: float | None = None,
        rope_jitter_coords: float | None = None,
        rope_rescale_coords: float | None = None,
        rope_dtype: str | None = None,
        drop_path_rate: float = 0.0,
        out_indices: int | Sequence[int] = -1,
        out_type: str = "featmap",
        final_norm: bool = True,
        frozen_stages: int = -1,
        attn_backend: str = "auto",
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.arch_settings = settings = resolve_vit_arch(
            arch,
            {
                "patch_size": patch_size,
                "in_channels": in_channels,
                "num_registers": num_registers,
                "ffn_layer": ffn_layer,
                "ffn_ratio": ffn_ratio,
                "qkv_bias": qkv_bias,
                "mask_k_bias": mask_k_bias,
                "ffn_bias": ffn_bias,
                "proj_bias": proj_bias,
                "layer_scale_init_value": layer_scale_init_value,
                "norm_layer": norm_layer,
                "untie_cls_and_patch_norms": untie_cls_and_patch_norms,
                "untie_global_and_local_cls_norm": untie_global_and_local_cls_norm,
                "rope_base": rope_base,
                "rope_min_period": rope_min_period,
                "rope_max_period": rope_max_period,
                "rope_normalize_coords": rope_normalize_coords,
                "rope_dtype": rope_dtype,
            },
        )
        self.embed_dims = self.embed_dim = self.num_features = settings["embed_dims"]
        self.num_layers = self.n_blocks = settings["num_layers"]
        self.num_heads = settings["num_heads"]
        self.patch_size = settings["patch_size"]
        self.num_registers = self.n_storage_tokens = settings["num_registers"]
        self.num_prefix_tokens = 1 + self.num_registers
        self.chunked_blocks = False
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {drop_path_rate}; expected a value in [0, 1)")
        if out_type not in OUT_TYPES:
            raise ValueError(f"out_type is {out_type!r}; expected one of {OUT_TYPES}")
        if not -1 <= frozen_stages <= self.num_layers:
            raise ValueError(
                f"frozen_stages is {frozen_stages}; expected -1 to {self.num_layers} (the blocks)"
            )
        self.drop_path_rate = drop_path_rate
        self.out_indices = self._resolve_out_indices(out_indices)
        self.out_type = out_type
        self.final_norm = final_norm
        self.frozen_stages = frozen_stages
        self.attn_backend = attn_backend
        self.with_cp = with_cp
        self._build_modules(
            shift_coords=rope_shift_coords,
            jitter_coords=rope_jitter_coords,
            rescale_coords=rope_rescale_coords,
        )
        self._freeze_stages()

    def _resolve_out_indices(self, out_indices: int | Sequence[int]) -> tuple[int, ...]:
        given = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
        resolved = tuple(index + self.num_layers if index < 0 else index for index in given)
        in_range = all(0 <= index < self.num_layers for index in resolved)
        if not resolved or not in_range or list(resolved) != sorted(set(resolved)):
            raise ValueError(
                f"out_indices is {out_indices}; expected ascending, distinct blocks out of "
                f"{self.num_layers}, counted from 0 or, if negative, from the end"
            )
        return resolved

    def _build_modules(self, **augmentation: float | None) -> None:
        settings, dims = self.arch_settings, self.embed_dims
        # Registration order is the key order of the official files and the order of random draws.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims))
        if self.num_registers:
            self.storage_tokens = nn.Parameter(torch.zeros(1, self.num_registers, dims))
        self.mask_token = nn.Parameter(torch.zeros(1, dims))
        self.patch_embed = PatchEmbed(settings["in_channels"], dims, self.patch_size)
        self.rope_embed = RotaryEmbedding2D(
            dims // self.num_heads,
            base=settings["rope_base"],
            min_period=settings["rope_min_period"],
            max_period=settings["rope_max_period"],
            normalize_coords=settings["rope_normalize_coords"],
            dtype=settings["rope_dtype"],
            **augmentation,
        )
        block_keys = (
            "ffn_layer",
            "ffn_ratio",
            "ffn_bias",
            "qkv_bias",
            "mask_k_bias",
            "proj_bias",
            "layer_scale_init_value",
            "norm_layer",
        )
        block_settings = {key: settings[key] for key in block_keys}
        block_settings["attn_backend"] = self.attn_backend
        self.blocks = nn.ModuleList(
            Block(dims, self.num_heads, **block_settings) for _ in range(self.num_layers)
        )
        norm = settings["norm_layer"]
        self.norm = build_norm(norm, dims)
        untie_cls = settings["untie_cls_and_patch_norms"]
        self.cls_norm = build_norm(norm, dims) if untie_cls else None
        untie_local = settings["untie_global_and_local_cls_norm"]
        self.local_cls_norm = build_norm(norm, dims) if untie_local else None
        self.head = nn.Identity()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Write every parameter and buffer, then run ``init_cfg``.

        Linear weights and tokens are drawn with standard deviation 0.02 from torch's default
        generator, in the order of registration; mask token and biases are 0.
        """
        nn.init.normal_(self.cls_token, std=0.02)
        if self.num_registers:
            nn.init.normal_(self.storage_tokens, std=0.02)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if isinstance(module, MaskedKBiasLinear):
                    module.reset_bias_mask()
            elif isinstance(
                module, PatchEmbed | RotaryEmbedding2D | LayerScale | LayerNorm | RMSNorm
            ):
                module.init_weights()
        if self.init_cfg:
            initialize(self, self.init_cfg)
        self._is_init = True

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        frozen = [self.patch_embed, *self.blocks[: self.frozen_stages]]
        if self.frozen_stages == self.num_layers:
            norms = (self.norm, self.cls_norm, self.local_cls_norm)
            frozen += [norm for norm in norms if norm is not None]
        return frozen

    def _freeze_stages(self) -> None:
        if self.frozen_stages >= 0:
            for name in ("cls_token", "storage_tokens", "mask_token"):
                if hasattr(self, name):
                    getattr(self, name).requires_grad_(False)
        for module in self._frozen_modules():
            module.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "DINOv3ViT":
        """Set training or eval mode; frozen parts stay in eval mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def forward(self, x: Tensor) -> tuple:
        """Features of the blocks in ``out_indices``, in the form of ``out_type``.

        Args:
            x: normalised images (B, C, H, W).

        Returns:
            One tensor per block (a pair of tensors for 'featmap+cls').
        """
        return tuple(
            self._format(prefix, patches, self.patch_embed.grid_size(x))
            for prefix, patches in self._features(x, self.out_indices, norm=self.final_norm)
        )

    def _format(self, prefix: Tensor, patches: Tensor, grid: tuple[int, int]) -> Any:
        if self.out_type == "cls_token":
            return prefix[:, 0]
        if self.out_type == "avg_featmap":
            return patches.mean(1)
        if self.out_type == "raw":
            return torch.cat((prefix, patches), dim=1)
        featmap = _to_featmap(patches, grid)
        return (featmap, prefix[:, 0]) if self.out_type == "featmap+cls" else featmap

    def forward_tokens(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> TokenOutput | list[TokenOutput]:
        """All tokens after the last block.

        The entries of a list may differ in size; by convention entry 0 holds global crops and
        entry 1 local crops.

        Args:
            images: normalised images (B, C, H, W), or a list of such batches.
            masks: patches to replace by the mask token, bool (B, N), one per entry or None.

        Returns:
            One :class:`TokenOutput` per entry; for a tensor a single one.

        Raises:
            TypeError: if images or masks are not tensors of the right dtype.
            ValueError: if their shapes do not fit.
        """
        if isinstance(images, Tensor):
            return self.forward_tokens([images], [masks])[0]
        x, shapes, grids = self._embed(list(images), masks)
        (x,) = self._run_blocks(x, shapes, grids, (self.num_layers - 1,))
        return [
            TokenOutput(prefix[:, 0], prefix[:, 1:], patches, prenorm)
            for prefix, patches, prenorm in self._final_norm(x, shapes)
        ]

    def forward_features(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> dict[str, Tensor | None] | list[dict[str, Tensor | None]]:
        """:meth:`forward_tokens` under the official keys, as a dict per entry."""
        if isinstance(images, Tensor):
            return self.forward_features([images], [masks])[0]
        outputs = self.forward_tokens(images, masks)
        return [
            {
                "x_norm_clstoken": output.cls,
                "x_storage_tokens": output.registers,
                "x_norm_patchtokens": output.patches,
                "x_prenorm": output.prenorm,
                "masks": mask,
            }
            for output, mask in zip(outputs, masks or [None] * len(outputs))
        ]

    def get_intermediate_layers(
        self,
        x: Tensor,
        *,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """Outputs of several blocks, with the signature of the official code.

        Args:
            x: normalised images (B, C, H, W).
            n: the last n blocks, or block indices from 0; results come in ascending order.
            reshape: return patches as (B, D, h, w) instead of (B, N, D).
            return_class_token, return_extra_tokens: add CLS (B, D), registers (B, R, D).
            norm: apply the final norm.

        Raises:
            ValueError: if an index is negative, repeated or out of range.
        """
        wanted = range(self.num_layers - n, self.num_layers) if isinstance(n, int) else sorted(n)
        if (
            not wanted
            or len(set(wanted)) < len(wanted)
            or not set(wanted) <= set(range(self.num_layers))
        ):
            raise ValueError(
                f"n is {n}; expected a number of blocks or distinct block indices out of "
                f"{self.num_layers}, counted from 0"
            )
        outputs = []
        for prefix, patches in self._features(x, wanted, norm=norm):
            if reshape:
                patches = _to_featmap(patches, self.patch_embed.grid_size(x))
            extra = (prefix[:, 0],) * return_class_token + (prefix[:, 1:],) * return_extra_tokens
            outputs.append((patches, *extra) if extra else patches)
        return tuple(outputs)

    def _features(
        self, x: Tensor, layers: Sequence[int], *, norm: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Prefix (B, 1 + R, D) and patch tokens (B, N, D) after each of the blocks ``layers``."""
        tokens, shapes, grids = self._embed([x], [None])
        outputs = self._run_blocks(tokens, shapes, grids, layers)
        if norm:
            return [self._final_norm(output, shapes)[0][:2] for output in outputs]
        return [self._split_prefix(output.view(*shapes[0], -1)) for output in outputs]

    def _embed(
        self, images: list[Tensor], masks: Sequence[Tensor | None] | None
    ) -> tuple[Tensor, list[SequenceShape], list[tuple[int, int]]]:
        """Packed tokens (sum of B * T, D), (B, T) of each entry, and its grid of patches."""
        masks = [None] * len(images) if masks is None else list(masks)
        self._check_inputs(images, masks)
        grids = [self.patch_embed.grid_size(batch) for batch in images]
        counts = [rows * columns for rows, columns in grids]
        patches = self.patch_embed(images)
        entries = patches.split([len(b) * count for b, count in zip(images, counts)])
        prefix = self._prefix(patches.dtype, use_mask_token=all(mask is None for mask in masks))
        packed = []
        for batch, count, entry, mask in zip(images, counts, entries, masks):
            entry = entry.view(len(batch), count, -1)
            if mask is not None:
                entry = torch.where(mask[..., None], self.mask_token.to(entry.dtype), entry)
            tokens = torch.cat((prefix.expand(len(batch), -1, -1), entry), dim=1)
            packed.append(tokens.flatten(0, 1))
        shapes = [(len(b), self.num_prefix_tokens + count) for b, count in zip(images, counts)]
        return packed[0] if len(packed) == 1 else torch.cat(packed), shapes, grids

    def _prefix(self, dtype: torch.dtype, *, use_mask_token: bool) -> Tensor:
        """CLS and register tokens (1, 1 + R, D)."""
        cls_token = self.cls_token
        if use_mask_token and torch.is_grad_enabled():
            # Distributed wrappers expect a gradient for every parameter, masks or not.
            cls_token = cls_token + 0 * self.mask_token
        if self.num_registers:
            cls_token = torch.cat((cls_token, self.storage_tokens), dim=1)
        return cls_token.to(dtype)

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
            if mask.dtype != torch.bool:
                raise TypeError(f"the mask has dtype {mask.dtype}; expected torch.bool")
            if tuple(mask.shape) != (shape[0], rows * columns):
                raise ValueError(
                    f"the mask has shape {tuple(mask.shape)}; expected {(shape[0], rows * columns)}"
                    f" for images of shape {shape}: one value per patch"
                )

    def _run_blocks(
        self,
        x: Tensor,
        shapes: list[SequenceShape],
        grids: list[tuple[int, int]],
        layers: Sequence[int],
    ) -> list[Tensor]:
        """Packed outputs of the blocks ``layers`` (ascending); later blocks are not run."""
        outputs = []
        for index in range(layers[-1] + 1):
            block = self.blocks[index]
            # All draws are made here, so that a block is a function of its arguments: recomputing
            # it under checkpointing needs no restored random state.
            inputs: list[Any] = [[self.rope_embed(*grid, augment=block.training) for grid in grids]]
            if block.training and self.drop_path_rate > 0:
                inputs += [draw_subset(shapes, self.drop_path_rate, x.device) for _ in range(2)]
            if self.with_cp and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, shapes, *inputs, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, shapes, *inputs)
            if index in layers:
                outputs.append(x)
        return outputs

    def _final_norm(
        self, x: Tensor, shapes: list[SequenceShape]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Normed prefix, normed patches and un-normed tokens of each packed entry."""
        sizes = [images * tokens for images, tokens in shapes]
        prefix_norms = [self._prefix_norm(index) for index in range(len(shapes))]
        entries = [entry.view(*shape, -1) for entry, shape in zip(x.split(sizes), shapes)]
        if all(norm is self.norm for norm in prefix_norms):
            normed = self.norm(x).split(sizes)
            pairs = [self._split_prefix(y.view(*shape, -1)) for y, shape in zip(normed, shapes)]
        else:
            pairs = [
                (norm(prefix), self.norm(patches))
                for norm, (prefix, patches) in zip(prefix_norms, map(self._split_prefix, entries))
            ]
        return [(*pair, entry) for pair, entry in zip(pairs, entries)]

    def _prefix_norm(self, index: int) -> nn.Module:
        """Final norm of CLS and registers for entry ``index`` of a list."""
        if self.local_cls_norm is not None and self.local_cls_norm.training and index == 1:
            return self.local_cls_norm
        return self.norm if self.cls_norm is None else self.cls_norm

    def _split_prefix(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]


def _to_featmap(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, D) to a contiguous (B, D, h, w)."""
    return patches.transpose(1, 2).unflatten(2, grid).contiguous()
