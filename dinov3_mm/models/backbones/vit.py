"""DINOv3 Vision Transformer (paper section 3.2)."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers import build_norm
from .vit_interface import ViTInterface
from .vit_variants import VIT_ARCHITECTURES, resolve_vit_arch


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
