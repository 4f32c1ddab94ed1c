"""DINOv2 Vision Transformer (arXiv 2304.07193; with registers: arXiv 2309.16588)."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers import resample_position_embedding
from .vit import ViTInterface
from .vit_trunk import Grid
from .zoo import DINOV2_ARCHITECTURES, resolve_dinov2_arch


@MODELS.register_module()
class DINOv2ViT(ViTInterface):
    """Vision Transformer with a learned position embedding, LayerScale and optional registers.

    The interface is that of :class:`DINOv3ViT`. Parameters carry the names of the official
    checkpoints. Arguments from ``patch_size`` to ``interpolate_antialias`` belong to the
    architecture; None takes the value from ``arch``. ``arch_settings`` holds all of them, and
    ``DINOv2ViT(arch=backbone.arch_settings)`` builds the same architecture again.

    The position embedding is added to CLS and patches; registers have none. At the grid of
    ``img_size`` it is used as it is, for other grids its patch part is resampled.

    Args:
        arch: name in :attr:`arch_zoo`, or a dict with ``embed_dims``, ``num_layers``, ``num_heads``
            and any architecture argument below.
        patch_size: side of a patch in pixels.
        in_channels: image channels.
        img_size: side in pixels of the images that the position embedding was made for.
        num_registers: register tokens.
        ffn_layer: 'mlp' or 'swiglufused'.
        ffn_ratio: nominal hidden width over ``embed_dims``.
        qkv_bias, ffn_bias, proj_bias: biases of the linears.
        layer_scale_init_value: initial LayerScale; 0 leaves LayerScale out.
        norm_layer: 'layernorm' (eps 1e-6), 'layernormbf16' (eps 1e-5) or 'rmsnorm' (eps 1e-5).
        interpolate_offset: added to the wanted grid to give the resampling factor; 0 resamples to
            the wanted size. The released models without registers have 0.1, those with registers 0.
        interpolate_antialias: low-pass filter in resampling; on in the released models with
            registers.
        drop_path_rate: share of the images that skip a residual branch in training, equal in all
            blocks.
        out_indices, out_type, final_norm, frozen_stages: see :class:`ViTInterface`.
        attn_backend: 'auto', 'sdpa', 'xformers' or 'varlen', see ``SelfAttention``.
        with_cp: recompute each block in the backward pass instead of storing its activations:
            True everything, 'selective' all but matrix products and attention.
        init_cfg: MMEngine initialisation config, run after the model's own initialisation.

    Raises:
        ValueError: if an argument is unknown or does not fit the others.
        ImportError: if ``attn_backend`` is 'xformers' and it is not installed.
    """

    arch_zoo = DINOV2_ARCHITECTURES
    _registers_key = "x_norm_regtokens"

    def __init__(
        self,
        arch: str | dict[str, Any] = "base",
        *,
        patch_size: int | None = None,
        in_channels: int | None = None,
        img_size: int | None = None,
        num_registers: int | None = None,
        ffn_layer: str | None = None,
        ffn_ratio: float | None = None,
        qkv_bias: bool | None = None,
        ffn_bias: bool | None = None,
        proj_bias: bool | None = None,
        layer_scale_init_value: float | None = None,
        norm_layer: str | None = None,
        interpolate_offset: float | None = None,
        interpolate_antialias: bool | None = None,
        drop_path_rate: float = 0.0,
        out_indices: int | Sequence[int] = -1,
        out_type: str = "featmap",
        final_norm: bool = True,
        frozen_stages: int = -1,
        attn_backend: str = "auto",
        with_cp: bool | str = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        settings = resolve_dinov2_arch(
            arch,
            {
                "patch_size": patch_size,
                "in_channels": in_channels,
                "img_size": img_size,
                "num_registers": num_registers,
                "ffn_layer": ffn_layer,
                "ffn_ratio": ffn_ratio,
                "qkv_bias": qkv_bias,
                "ffn_bias": ffn_bias,
                "proj_bias": proj_bias,
                "layer_scale_init_value": layer_scale_init_value,
                "norm_layer": norm_layer,
                "interpolate_offset": interpolate_offset,
                "interpolate_antialias": interpolate_antialias,
            },
        )
        super().__init__(
            settings,
            rope=None,
            drop_path_rate=drop_path_rate,
            out_indices=out_indices,
            out_type=out_type,
            final_norm=final_norm,
            frozen_stages=frozen_stages,
            attn_backend=attn_backend,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        self.num_register_tokens = self.num_registers

    def _build_tokens(self) -> None:
        dims = self.embed_dims
        num_patches = (self.arch_settings["img_size"] // self.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, dims))
        if self.num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, self.num_registers, dims))
        self.mask_token = nn.Parameter(torch.zeros(1, dims))

    def _prefix_tokens(self) -> tuple[Tensor, Tensor | None]:
        registers = self.register_tokens if self.num_registers else None
        return self.cls_token + self.pos_embed[:, :1], registers

    def _add_positions(self, patches: Tensor, grid: Grid) -> Tensor:
        positions = resample_position_embedding(
            self.pos_embed[:, 1:],
            grid,
            offset=self.arch_settings["interpolate_offset"],
            antialias=self.arch_settings["interpolate_antialias"],
        )
        return patches + positions.to(patches.dtype)
