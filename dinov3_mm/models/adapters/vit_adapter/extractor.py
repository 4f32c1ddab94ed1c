"""Extractors: tokens of a pyramid collect features of a ViT by deformable attention."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from .deformable_attention import DeformableAttention

_EPS = 1e-6
Grid = tuple[int, int]  # rows and columns


class Sampling(NamedTuple):
    """Where the tokens of the pyramid look on the grid of patches.

    Attributes:
        grids: rows and columns of the levels of the pyramid.
        reference_points: centres of the tokens of all levels, x and y in [0, 1], (1, Q, 1, 2).
        spatial_shapes: rows and columns of the grid of patches, as a tensor (1, 2).
        level_start_index: zero, as a tensor (1,).
    """

    grids: Sequence[Grid]
    reference_points: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor

    @classmethod
    def between(cls, grids: Sequence[Grid], patches: Grid, device: torch.device) -> "Sampling":
        """From the levels ``grids`` to a grid of ``patches``."""
        points = torch.cat([_centres(grid, device) for grid in grids])
        return cls(
            grids,
            points[None, :, None],
            torch.tensor([patches], device=device),
            torch.zeros(1, dtype=torch.long, device=device),
        )


class Extractor(nn.Module):
    """Deformable cross-attention and a convolutional FFN (arXiv 2205.08534, section 3.4).

    Args:
        embed_dims: channels.
        num_heads, num_points: of the attention.
        value_proj_ratio: width of the attention's values over ``embed_dims``.
        ffn_ratio: hidden width of the FFN over ``embed_dims``.
        drop_path_rate: share of the images that skip the FFN in training.
    """

    def __init__(
        self,
        embed_dims: int,
        *,
        num_heads: int,
        num_points: int,
        value_proj_ratio: float,
        ffn_ratio: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(embed_dims, eps=_EPS)
        self.feat_norm = nn.LayerNorm(embed_dims, eps=_EPS)
        self.attn = DeformableAttention(
            embed_dims=embed_dims,
            num_heads=num_heads,
            num_levels=1,
            num_points=num_points,
            dropout=0.0,
            batch_first=True,
            value_proj_ratio=value_proj_ratio,
        )
        self.ffn = ConvFFN(embed_dims, int(embed_dims * ffn_ratio))
        self.ffn_norm = nn.LayerNorm(embed_dims, eps=_EPS)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, query: Tensor, features: Tensor, sampling: Sampling) -> Tensor:
        """New tokens (B, Q, C).

        Args:
            query: tokens of the pyramid (B, Q, C).
            features: patch tokens (B, N, C).
            sampling: geometry of both.
        """
        query = query + self.attn.attend(
            self.query_norm(query), self.feat_norm(features), *sampling[1:]
        )
        return query + self.drop_path(self.ffn(self.ffn_norm(query), sampling.grids))


class Interaction(nn.Module):
    """The extractors of one layer of the ViT.

    Args:
        num_extra: extractors after the first, on the same features.
        **extractor: see :class:`Extractor`.
    """

    def __init__(self, num_extra: int, **extractor) -> None:
        super().__init__()
        self.extractor = Extractor(**extractor)
        self.extra_extractors = (
            nn.ModuleList(Extractor(**extractor) for _ in range(num_extra)) if num_extra else None
        )

    def extractors(self) -> list[Extractor]:
        """All of them, in the order in which they run."""
        return [self.extractor, *(self.extra_extractors or [])]


class ConvFFN(nn.Module):
    """Two linears with a depthwise convolution of each level between them.

    Args:
        embed_dims: channels.
        hidden_dims: hidden width.
    """

    def __init__(self, embed_dims: int, hidden_dims: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.dwconv = LevelwiseConv(hidden_dims)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dims, embed_dims)

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Tokens (B, Q, C) of the levels ``grids``."""
        return self.fc2(self.act(self.dwconv(self.fc1(x), grids)))


class LevelwiseConv(nn.Module):
    """A depthwise 3x3 convolution, shared by the levels of a pyramid of tokens."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dims, dims, 3, padding=1, groups=dims)

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Tokens (B, Q, C) of the levels ``grids``."""
        levels = [self.dwconv(level).flatten(2) for level in split_levels(x, grids)]
        return torch.cat(levels, dim=2).transpose(1, 2)


def split_levels(tokens: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """Tokens (B, Q, C) as maps (B, C, rows, columns), one per level."""
    parts = tokens.transpose(1, 2).split([rows * columns for rows, columns in grids], dim=2)
    return [part.unflatten(2, grid) for part, grid in zip(parts, grids)]


def _centres(grid: Grid, device: torch.device) -> Tensor:
    """Centres of a grid's cells, row by row, (rows * columns, 2)."""
    y, x = ((torch.arange(n, dtype=torch.float32, device=device) + 0.5) / n for n in grid)
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1)
