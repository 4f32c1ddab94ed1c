"""DINOv3 Vision Transformer (paper section 3.2)."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from dinov3_mm.models.layers import build_norm

from .outputs import TokenOutput, check_out_type, resolve_layers, resolve_out_indices
from .vit_trunk import Grid, ViTTrunk, unpack
from .zoo import VIT_ARCHITECTURES, resolve_vit_arch

# --- What all ViTs offer: features of blocks, tokens, frozen stages ---


class ViTInterface(ViTTrunk):
    """Feature methods on top of the mathematics; the base of :class:`DINOv3ViT` and others.

    Args:
        settings: every architecture value.
        out_indices: blocks whose output :meth:`forward` returns, ascending; negative from the end.
        out_type: what :meth:`forward` returns per block: 'featmap' (B, D, h, w), 'cls_token'
            (B, D), 'avg_featmap' (B, D), 'raw' (B, 1 + R + N, D) or 'featmap+cls', a pair.
        final_norm: apply the final norm to every output of :meth:`forward`.
        frozen_stages: 0 freezes tokens and patch embedding, k also the first k blocks, the number
            of blocks everything. Frozen parts stay in eval mode. -1 freezes nothing.
        **trunk: see :class:`ViTTrunk`.
    """

    # Name of the registers in the dict that the official code returns.
    _registers_key: str

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        out_indices: int | Sequence[int],
        out_type: str,
        final_norm: bool,
        frozen_stages: int,
        **trunk: Any,
    ) -> None:
        super().__init__(settings, **trunk)
        if not -1 <= frozen_stages <= self.num_layers:
            raise ValueError(
                f"frozen_stages is {frozen_stages}; expected -1 to {self.num_layers} (the blocks)"
            )
        self.out_indices = resolve_out_indices(out_indices, self.num_layers)
        self.out_type = check_out_type(out_type)
        self.final_norm = final_norm
        self.frozen_stages = frozen_stages
        self._freeze_stages()

    @property
    def token_stride(self) -> int:
        """Pixels from one patch token to the next."""
        return self.patch_size

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        frozen = [self.patch_embed, *self.blocks[: self.frozen_stages]]
        if self.frozen_stages == self.num_layers:
            norms = (self.norm, self.cls_norm, self.local_cls_norm)
            frozen += [norm for norm in norms if norm is not None]
        return frozen

    def _freeze_stages(self) -> None:
        """Take the gradient from the blocks that are frozen, and put them into eval mode."""
        if self.frozen_stages >= 0:
            for parameter in self.parameters(recurse=False):
                parameter.requires_grad_(False)
        for module in self._frozen_modules():
            module.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "ViTInterface":
        """Set training or eval mode; frozen parts stay in eval mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def forward(self, x: Tensor) -> tuple:
        """Features of the blocks in ``out_indices``, in the form of ``out_type``.

        Args:
            x: normalised images (B, C, H, W). Trailing pixels that fill no patch are ignored.

        Returns:
            One tensor per block (a pair of tensors for 'featmap+cls').
        """
        grid = self.patch_embed.grid_size(x)
        features = self._features(x, self.out_indices, norm=self.final_norm)
        return tuple(self._format(prefix, patches, grid) for prefix, patches in features)

    def _format(self, prefix: Tensor, patches: Tensor, grid: Grid) -> Any:
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
            TypeError: if images or masks are not of the right dtype.
            ValueError: if their shapes do not fit.
        """
        if isinstance(images, Tensor):
            return self.forward_tokens([images], [masks])[0]
        masks = [None] * len(images) if masks is None else list(masks)
        x, shapes, grids = self._embed(list(images), masks)
        (x,) = self._run_blocks_in_chunks(x, shapes, grids, (self.num_layers - 1,))
        outputs = zip(self._final_norm(x, shapes), unpack(x, shapes))
        return [
            TokenOutput(*self._split_cls(prefix), patches, prenorm)
            for (prefix, patches), prenorm in outputs
        ]

    def forward_features(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> dict[str, Tensor | None] | list[dict[str, Tensor | None]]:
        """:meth:`forward_tokens` under the official keys, as a dict per entry."""
        if isinstance(images, Tensor):
            return self.forward_features([images], [masks])[0]
        masks = [None] * len(images) if masks is None else list(masks)
        outputs = self.forward_tokens(images, masks)
        return [output.official(mask, self._registers_key) for output, mask in zip(outputs, masks)]

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
        outputs = []
        for prefix, patches in self._features(x, resolve_layers(n, self.num_layers), norm=norm):
            if reshape:
                patches = _to_featmap(patches, self.patch_embed.grid_size(x))
            cls, registers = self._split_cls(prefix)
            extra = (cls,) * return_class_token + (registers,) * return_extra_tokens
            outputs.append((patches, *extra) if extra else patches)
        return tuple(outputs)

    def _features(
        self, x: Tensor, layers: Sequence[int], *, norm: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Prefix (B, 1 + R, D) and patch tokens (B, N, D) after each of the blocks ``layers``."""
        tokens, shapes, grids = self._embed([x], [None])
        outputs = self._run_blocks_in_chunks(tokens, shapes, grids, layers)
        if norm:
            return [self._final_norm(output, shapes)[0] for output in outputs]
        return [self._split_prefix(unpack(output, shapes)[0]) for output in outputs]

    def _split_cls(self, prefix: Tensor) -> tuple[Tensor, Tensor]:
        """CLS (B, D) and registers (B, R, D)."""
        cls, registers = prefix.split((1, self.num_registers), dim=1)
        return cls.squeeze(1), registers


def _to_featmap(patches: Tensor, grid: Grid) -> Tensor:
    """(B, N, D) to a contiguous (B, D, h, w)."""
    return patches.transpose(1, 2).unflatten(2, grid).contiguous()


# --- DINOv3 ---


@MODELS.register_module()
class DINOv3ViT(ViTInterface):
    """Vision Transformer with registers, axial RoPE, LayerScale and a masked K bias.

    Parameters and buffers carry the names of the official checkpoints. Arguments from
    ``patch_size`` to ``rope_dtype``, except the three RoPE augmentations, belong to the
    architecture; None takes the value from ``arch``. ``arch_settings`` holds all of them, and
    ``DINOv3ViT(arch=backbone.arch_settings)`` builds the same architecture again.

    Args:
        arch: name in :attr:`arch_zoo`, or a dict with ``embed_dims``, ``num_layers``, ``num_heads``
            and any architecture argument below.
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
        attn_backend: 'auto', 'sdpa', 'xformers' or 'varlen', see ``SelfAttention``.
        with_cp: recompute each block in the backward pass instead of storing its activations:
            True everything, 'selective' all but matrix products and attention.
        init_cfg: MMEngine initialisation config, run after the model's own initialisation.

    Raises:
        ValueError: if an argument is unknown or does not fit the others.
        ImportError: if ``attn_backend`` is 'xformers' and it is not installed.
    """

    arch_zoo = VIT_ARCHITECTURES
    _registers_key = "x_storage_tokens"

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
        with_cp: bool | str = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        settings = resolve_vit_arch(
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
        rope_settings = ("base", "min_period", "max_period", "normalize_coords", "dtype")
        super().__init__(
            settings,
            rope={
                **{key: settings[f"rope_{key}"] for key in rope_settings},
                "shift_coords": rope_shift_coords,
                "jitter_coords": rope_jitter_coords,
                "rescale_coords": rope_rescale_coords,
            },
            drop_path_rate=drop_path_rate,
            out_indices=out_indices,
            out_type=out_type,
            final_norm=final_norm,
            frozen_stages=frozen_stages,
            attn_backend=attn_backend,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        self.n_storage_tokens = self.num_registers

    def _build_tokens(self) -> None:
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dims))
        if self.num_registers:
            self.storage_tokens = nn.Parameter(torch.zeros(1, self.num_registers, self.embed_dims))
        self.mask_token = nn.Parameter(torch.zeros(1, self.embed_dims))

    def _build_norms(self) -> None:
        super()._build_norms()
        norm, dims = self.arch_settings["norm_layer"], self.embed_dims
        if self.arch_settings["untie_cls_and_patch_norms"]:
            self.cls_norm = build_norm(norm, dims)
        if self.arch_settings["untie_global_and_local_cls_norm"]:
            self.local_cls_norm = build_norm(norm, dims)

    def _prefix_tokens(self) -> tuple[Tensor, Tensor | None]:
        return self.cls_token, self.storage_tokens if self.num_registers else None
