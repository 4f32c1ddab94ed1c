"""The mathematics of the ConvNeXt: stages, final norm, initialisation."""

from itertools import pairwise
from typing import Any

import torch
from mmengine.model.weight_init import initialize
from torch import Tensor, nn

from ..layers import ConvNeXtBlock, LayerNorm, PatchConv2d
from ..layers.recompute import check_mode
from .recorded_weights import RecordedWeights

NUM_STAGES = 4
_STEM_STRIDE = 4


class ConvNeXtTrunk(RecordedWeights):
    """Parameters and stages; :class:`DINOv3ConvNeXt` adds the interface.

    Args:
        settings: every architecture value, see ``resolve_convnext_arch``.
        drop_path_rate: probability that an image skips the last residual branch in training.
        with_cp: recompute blocks in the backward pass.
        init_cfg: MMEngine initialisation config.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        drop_path_rate: float,
        with_cp: bool | str,
        init_cfg: dict | list[dict] | None,
    ) -> None:
        super().__init__(init_cfg)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {drop_path_rate}; expected a value in [0, 1)")
        self.arch_settings = settings
        self.feature_dims = tuple(settings["dims"])
        self.embed_dims = self.embed_dim = self.num_features = self.feature_dims[-1]
        self.num_layers = self.n_blocks = NUM_STAGES
        self.patch_size = settings["patch_size"]
        self.num_registers = self.n_storage_tokens = 0
        self.input_pad_size = _STEM_STRIDE
        self.token_stride = self.stage_stride(NUM_STAGES - 1)
        self.chunked_blocks = False
        self.drop_path_rate = drop_path_rate
        self.with_cp = check_mode(with_cp)
        self._build_modules()

    def _build_modules(self) -> None:
        # Registration order is the key order of the official files and the order of random draws.
        settings, dims = self.arch_settings, self.feature_dims
        stem = (PatchConv2d(settings["in_channels"], dims[0], _STEM_STRIDE), _norm(dims[0]))
        self.downsample_layers = nn.ModuleList([nn.Sequential(*stem)])
        for narrow, wide in pairwise(dims):
            self.downsample_layers.append(
                nn.Sequential(_norm(narrow), PatchConv2d(narrow, wide, 2))
            )
        rates = iter(torch.linspace(0, self.drop_path_rate, sum(settings["depths"]), device="cpu"))
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    ConvNeXtBlock(
                        width,
                        layer_scale_init_value=settings["layer_scale_init_value"],
                        drop_rate=next(rates).item(),
                        with_cp=self.with_cp,
                    )
                    for _ in range(depth)
                )
            )
            for depth, width in zip(settings["depths"], dims)
        )
        self.norm = _norm(dims[-1])
        # The official files hold the final norm twice, as the norm of the last stage too.
        self.norms = nn.ModuleList([*(nn.Identity() for _ in dims[:-1]), self.norm])
        self.head = nn.Identity()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Write every parameter, then run ``init_cfg``.

        Weights are drawn with standard deviation 0.02 from torch's default generator, in the order
        of registration; biases are 0, norms the identity, ``gamma`` is its initial value.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, LayerNorm):
                module.init_weights()
            elif isinstance(module, ConvNeXtBlock) and module.gamma is not None:
                nn.init.constant_(module.gamma, module.init_value)
        if self.init_cfg:
            initialize(self, self.init_cfg)
        self._is_init = True

    @staticmethod
    def stage_stride(stage: int) -> int:
        """Pixels per step of the map of a stage: 4, 8, 16, 32."""
        return _STEM_STRIDE * 2**stage

    def _run_stages(self, images: Tensor, last: int) -> list[Tensor]:
        """Maps (B, h, w, C) of the stages up to ``last``."""
        x = images.to(self.downsample_layers[0][0].weight.dtype).permute(0, 2, 3, 1)
        outputs = []
        for downsample, stage in zip(self.downsample_layers[: last + 1], self.stages):
            x = downsample(x)
            for block in stage:
                # Drawn here, so that recomputing a block needs no restored random state.
                scale = block.draw_scale(x.shape[0], x.device)
                x = block(x, scale)
            outputs.append(x)
        return outputs

    def _check_images(self, images: Tensor, stage: int = NUM_STAGES - 1) -> None:
        """Raise an error unless ``images`` give the map of ``stage`` at least one position."""
        channels, least = self.arch_settings["in_channels"], self.stage_stride(stage)
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[1] != channels or min(shape[2:]) < least:
            raise ValueError(
                f"images have shape {shape}; expected (B, {channels}, H, W) with sides of at least "
                f"{least} pixels, the stride of the map"
            )
        if not images.is_floating_point():
            raise TypeError(
                f"images have dtype {images.dtype}; expected normalised floating-point images"
            )


def _norm(dims: int) -> LayerNorm:
    return LayerNorm(dims, eps=1e-6)
