"""DINOv3 ConvNeXt (paper section 5.2; architecture of arXiv 2201.03545)."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from .convnext_trunk import NUM_STAGES, ConvNeXtTrunk
from .convnext_variants import CONVNEXT_ARCHITECTURES, resolve_convnext_arch
from .outputs import TokenOutput, check_out_type, resolve_layers, resolve_out_indices


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
