"""DINOv3 ConvNeXt (paper section 5.2; architecture of arXiv 2201.03545)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from mmengine.model.weight_init import initialize
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from dinov3_mm.models.layers import ConvNeXtBlock, LayerNorm, PatchConv2d
from dinov3_mm.models.layers.block import check_mode

from .outputs import (
    RecordedWeights,
    TokenOutput,
    check_out_type,
    resolve_layers,
    resolve_out_indices,
)
from .zoo import CONVNEXT_ARCHITECTURES, resolve_convnext_arch

# --- The mathematics ---


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


# --- The interface of the ViTs ---


@MODELS.register_module()
class DINOv3ConvNeXt(ConvNeXtTrunk):
    """ConvNeXt with the interface of :class:`DINOv3ViT`; its layers are the four stages.

    Parameters carry the names of the official checkpoints. ``state_dict`` lists the final norm
    twice, as ``norm`` and as ``norms.3``, the norm of the last stage; it is one module.

    The last stage has stride 32 (:attr:`token_stride`). CLS is the norm of the mean of its
    positions, and there are no registers. :attr:`feature_dims` holds the widths of the stages.

    Args:
        arch: name in :attr:`arch_zoo`, or a dict with ``depths`` and ``dims``, four numbers each,
            and any of the next three arguments. ``DINOv3ConvNeXt(arch=backbone.arch_settings)``
            builds the same architecture again.
        patch_size: :meth:`get_intermediate_layers` resizes the maps of all stages to this stride in
            pixels; None, as in the released models, leaves them. Nothing else depends on it.
        in_channels: image channels.
        layer_scale_init_value: initial ``gamma`` of the residual branches; 0 leaves it out.
        drop_path_rate: probability that an image skips the last residual branch in training; it
            rises from 0 at the first block in equal steps.
        out_indices: stages whose output :meth:`forward` returns, ascending; negative from the end.
            (0, 1, 2, 3) is the pyramid of strides 4, 8, 16 and 32.
        out_type: what :meth:`forward` returns per stage: 'featmap' (B, C, h, w), 'cls_token', the
            norm of the mean (B, C), 'avg_featmap', the mean of the norm (B, C), 'raw', CLS and
            positions (B, 1 + h * w, C), or 'featmap+cls', a pair.
        final_norm: apply the final norm to the last stage in :meth:`forward`. The other stages have
            no norm.
        frozen_stages: k freezes the first k stages with the downsampling before each, all of them
            also the final norm. Frozen parts stay in eval mode. 0 and -1 freeze nothing.
        with_cp: recompute each block in the backward pass instead of storing its activations:
            True everything, 'selective' all but matrix products and attention.
        init_cfg: MMEngine initialisation config, run after the model's own initialisation.

    Raises:
        ValueError: if an argument is unknown or does not fit the others.
    """

    arch_zoo = CONVNEXT_ARCHITECTURES

    def __init__(
        self,
        arch: str | dict[str, Any] = "tiny",
        *,
        patch_size: int | None = None,
        in_channels: int | None = None,
        layer_scale_init_value: float | None = None,
        drop_path_rate: float = 0.0,
        out_indices: int | Sequence[int] = -1,
        out_type: str = "featmap",
        final_norm: bool = True,
        frozen_stages: int = 0,
        with_cp: bool | str = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        settings = resolve_convnext_arch(
            arch,
            {
                "patch_size": patch_size,
                "in_channels": in_channels,
                "layer_scale_init_value": layer_scale_init_value,
            },
        )
        super().__init__(
            settings, drop_path_rate=drop_path_rate, with_cp=with_cp, init_cfg=init_cfg
        )
        if not -1 <= frozen_stages <= NUM_STAGES:
            raise ValueError(f"frozen_stages is {frozen_stages}; expected -1 to {NUM_STAGES}")
        self.out_indices = resolve_out_indices(out_indices, NUM_STAGES, "stages")
        self.out_type = check_out_type(out_type)
        self.final_norm = final_norm
        self.frozen_stages = frozen_stages
        for module in self._frozen_modules():
            module.eval().requires_grad_(False)

    def _frozen_modules(self) -> list[nn.Module]:
        count = max(0, self.frozen_stages)
        frozen = [*self.downsample_layers[:count], *self.stages[:count]]
        return [*frozen, self.norm] if count == NUM_STAGES else frozen

    def train(self, mode: bool = True) -> "DINOv3ConvNeXt":
        """Set training or eval mode; frozen parts stay in eval mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def forward(self, x: Tensor) -> tuple:
        """Features of the stages in ``out_indices``, in the form of ``out_type``.

        Args:
            x: normalised images (B, C, H, W). Trailing pixels that fill no position are ignored.

        Returns:
            One tensor per stage (a pair of tensors for 'featmap+cls').
        """
        self._check_images(x, self.out_indices[-1])
        outputs = self._run_stages(x, self.out_indices[-1])
        return tuple(self._format(outputs[stage], stage) for stage in self.out_indices)

    def _format(self, output: Tensor, stage: int) -> Any:
        norm = self.norms[stage] if self.final_norm else nn.Identity()
        if self.out_type == "cls_token":
            return norm(output.mean((1, 2)))
        if self.out_type == "avg_featmap":
            return norm(output).mean((1, 2))
        if self.out_type == "raw":
            return norm(torch.cat((output.mean((1, 2))[:, None], output.flatten(1, 2)), dim=1))
        featmap = norm(output).permute(0, 3, 1, 2).contiguous()
        return (featmap, norm(output.mean((1, 2)))) if "cls" in self.out_type else featmap

    def forward_tokens(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> TokenOutput | list[TokenOutput]:
        """All tokens after the last stage.

        Args:
            images: normalised images (B, C, H, W), or a list of such batches, which may differ in
                size.
            masks: accepted for the interface of the ViT and ignored: a ConvNeXt has no mask token.

        Returns:
            One :class:`TokenOutput` per entry; for a tensor a single one. ``registers`` is
            (B, 0, C), and ``prenorm`` holds the positions only, without CLS.

        Raises:
            TypeError: if images are not of floating point.
            ValueError: if their shapes do not fit.
        """
        if isinstance(images, Tensor):
            return self._tokens(images)
        if not images:
            raise ValueError("got no batch of images; expected at least one")
        return [self._tokens(batch) for batch in images]

    def _tokens(self, images: Tensor) -> TokenOutput:
        self._check_images(images)
        prenorm = self._run_stages(images, NUM_STAGES - 1)[-1].flatten(1, 2)
        normed = self.norm(torch.cat((prenorm.mean(1, keepdim=True), prenorm), dim=1))
        return TokenOutput(normed[:, 0], prenorm[:, :0], normed[:, 1:], prenorm)

    def forward_features(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> dict[str, Tensor | None] | list[dict[str, Tensor | None]]:
        """:meth:`forward_tokens` under the official keys, as a dict per entry."""
        if isinstance(images, Tensor):
            return self.forward_features([images], [masks])[0]
        masks = [None] * len(images) if masks is None else list(masks)
        outputs = self.forward_tokens(images)
        return [output.official(mask) for output, mask in zip(outputs, masks, strict=True)]

    def get_intermediate_layers(
        self,
        x: Tensor,
        *,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], ...]:
        """Outputs of several stages, with the signature of the official code.

        Args:
            x: normalised images (B, C, H, W).
            n: the last n stages, or stage indices from 0; results come in ascending order.
            reshape: return positions as (B, C, h, w) instead of (B, N, C).
            return_class_token: add the mean of the positions (B, C).
            norm: apply the final norm to the last stage.

        Raises:
            ValueError: if an index is negative, repeated or out of range.
        """
        stages = resolve_layers(n, NUM_STAGES, "stage")
        self._check_images(x, stages[-1])
        maps = self._run_stages(x, stages[-1])
        outputs = []
        for stage in stages:
            final = self.norms[stage] if norm else nn.Identity()
            patches = final(self._resize(maps[stage], x))
            patches = patches.permute(0, 3, 1, 2).contiguous() if reshape else patches.flatten(1, 2)
            cls = (final(maps[stage].mean((1, 2))),) * return_class_token
            outputs.append((patches, *cls) if cls else patches)
        return tuple(outputs)

    def _resize(self, output: Tensor, images: Tensor) -> Tensor:
        """Map (B, h, w, C) at the stride of ``patch_size``."""
        if self.patch_size is None:
            return output
        size = [side // self.patch_size for side in images.shape[-2:]]
        resized = F.interpolate(
            output.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True, align_corners=False
        )
        return resized.permute(0, 2, 3, 1)
