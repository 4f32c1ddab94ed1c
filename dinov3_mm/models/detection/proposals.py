"""Proposals of the first stage: one box for each position of a pyramid made from the memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# A proposal is used if its centre and size lie strictly between these shares of the image's size.
_MIN_SHARE, _MAX_SHARE = 0.01, 0.99


@dataclass
class Proposals:
    """Tokens (B, N, D), boxes (B, N, 4) in pixels, and each image's width and height (B, 2)."""

    tokens: Tensor
    boxes: Tensor
    image_sizes: Tensor


class ProposalPyramid(nn.ModuleList):
    """Levels of several strides from one map, with a square box at each position.

    Finer levels are transposed convolutions, coarser ones convolutions, of kernel and stride 2.
    Position (y, x) of level l has the box of centre ``(x + 0.5, y + 0.5) * stride`` and side
    ``min_size * 2**l``. A box whose centre or side lies outside 1 to 99 % of the image, or whose
    position is padding, has its token set to zero and its numbers to the padded size. A map that is
    smaller than one position of a coarser level goes without that level.

    Args:
        embed_dims: channels.
        in_stride: stride of the map in pixels.
        strides: strides of the levels in pixels, from a quarter to four times ``in_stride``.
        min_size: side of the boxes of the first level in pixels.

    Raises:
        ValueError: if a level has another stride.
    """

    def __init__(
        self,
        embed_dims: int,
        *,
        in_stride: int = 16,
        strides: Sequence[int] = (8, 16, 32, 64),
        min_size: float = 50,
    ) -> None:
        super().__init__(_level(embed_dims, in_stride, stride) for stride in strides)
        self.strides = tuple(strides)
        self.reductions = tuple(stride / in_stride for stride in strides)
        self.min_size = min_size

    def forward(self, memory: Tensor, mask: Tensor) -> Proposals:
        """Make proposals.

        Args:
            memory: map (B, D, h, w).
            mask: True on padding, (B, h, w).
        """
        fits = [min(memory.shape[-2:]) >= reduction for reduction in self.reductions]
        maps = [level(memory) for level, is_there in zip(self, fits) if is_there]
        masks = [_resize_mask(mask, level.shape[-2:]) for level in maps]
        sizes = _valid_size(masks[0]) * self.strides[0]
        boxes = torch.cat(
            [self._boxes(level, map_.shape[-2:], memory) for level, map_ in enumerate(maps)]
        )
        tokens = torch.cat([map_.flatten(2).transpose(1, 2) for map_ in maps], dim=1)
        padding = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        limits = sizes.repeat(1, 2)[:, None]
        inside = ((boxes > _MIN_SHARE * limits) & (boxes < _MAX_SHARE * limits)).all(-1)
        unused = (padding | ~inside)[..., None]
        outside = max(maps[0].shape[-2:]) * self.strides[0]
        boxes = boxes.expand(len(memory), -1, -1).masked_fill(unused, outside)
        return Proposals(tokens.masked_fill(unused, 0), boxes, sizes)

    def _boxes(self, level: int, grid: tuple[int, int], like: Tensor) -> Tensor:
        rows, columns = (
            (torch.arange(count, device=like.device, dtype=torch.float32) + 0.5)
            * self.strides[level]
            for count in grid
        )
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        side = torch.full_like(x, self.min_size * 2**level)
        return torch.stack((x, y, side, side), dim=-1).flatten(0, 1)


class _ChannelNorm(nn.Module):
    """LayerNorm over the channels of a map (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(x.movedim(1, -1)).movedim(-1, 1)


def _level(channels: int, in_stride: int, stride: int) -> nn.Sequential:
    kinds = {0.25: (_up, 2), 0.5: (_up, 1), 1: (_up, 0), 2: (_down, 1), 4: (_down, 2)}
    if stride / in_stride not in kinds:
        known = ", ".join(f"{ratio * in_stride:g}" for ratio in kinds)
        raise ValueError(f"no level of stride {stride} from a map of {in_stride}; expected {known}")
    resize, count = kinds[stride / in_stride]
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [_ChannelNorm(channels), nn.GELU()] if layers else []
        layers.append(resize(channels))
    return nn.Sequential(*layers)


def _up(channels: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, channels, 2, stride=2)


def _down(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 2, stride=2)


def _resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(mask[:, None].float(), size, mode="nearest")[:, 0].bool()


def _valid_size(mask: Tensor) -> Tensor:
    """Unmasked columns and rows (B, 2) of masks (B, h, w)."""
    return torch.stack(((~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)), dim=-1).float()
