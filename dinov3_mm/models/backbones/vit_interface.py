"""The public methods of the ViT backbones: features of blocks, tokens, frozen stages."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .outputs import TokenOutput, check_out_type, resolve_layers, resolve_out_indices
from .vit_trunk import Grid, ViTTrunk, unpack


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
