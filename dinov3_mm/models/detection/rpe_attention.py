"""Cross-attention to all pixels, steered by boxes (Plain-DETR, arXiv 2308.01904)."""

from math import log2

import torch
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from torch import Tensor, nn
from torch.nn import functional as F

from dinov3_mm.errors import hint

# Added to the scores of padded positions: an attention that has nowhere else to go stays defined.
_PADDING_BIAS = -100.0


class BoxRPECrossAttention(nn.Module):
    """Attention whose scores have a bias by the place of a pixel relative to a query's box.

    The bias is the sum of one function of the distances to the left and right edge and one of those
    to the upper and lower edge, both small MLPs, so that each is computed for columns and rows only
    ("decomposed").

    Args:
        embed_dims: channels.
        num_heads: heads.
        hidden_dims: hidden width of the MLPs.
        stride: pixels from one position of the map to the next.
        rpe_type: 'linear' gives distances in pixels to the MLPs, 'abs_log8' their
            ``sign(d) * log2(|d| + 1) / 3``.
        normalized_boxes: boxes are given as shares of the map's size and not in pixels.

    Raises:
        ValueError: for another ``rpe_type``, or heads that do not divide the channels.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        *,
        hidden_dims: int = 512,
        stride: int = 16,
        rpe_type: str = "linear",
        normalized_boxes: bool = False,
    ) -> None:
        super().__init__()
        if rpe_type not in _SCALES:
            raise ValueError(f"rpe_type is {rpe_type!r}; {hint(rpe_type, _SCALES)}")
        if embed_dims % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {embed_dims} channels")
        self.num_heads = num_heads
        self.stride = stride
        self.rpe_type = rpe_type
        self.normalized_boxes = normalized_boxes
        self.cpb_mlp1 = _bias_mlp(hidden_dims, num_heads)
        self.cpb_mlp2 = _bias_mlp(hidden_dims, num_heads)
        self.q = nn.Linear(embed_dims, embed_dims)
        self.k = nn.Linear(embed_dims, embed_dims)
        self.v = nn.Linear(embed_dims, embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(
        self,
        query: Tensor,
        boxes: Tensor,
        key: Tensor,
        value: Tensor,
        grid: tuple[int, int],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, D).
            boxes: (B, Q, 4), centre and size.
            key, value: (B, h * w, D), row by row.
            grid: (h, w).
            padding_mask: True where a position is padding, (B, h * w).

        Returns:
            (B, Q, D).
        """
        heads = (self._heads(self.q(query)), self._heads(self.k(key)), self._heads(self.v(value)))
        # Distances of a thousand pixels do not fit into bfloat16.
        with torch.autocast(query.device.type, enabled=False):
            bias = self._bias(boxes.float(), grid)
            if padding_mask is not None:
                bias = bias + padding_mask[:, None, None] * _PADDING_BIAS
        output = F.scaled_dot_product_attention(*heads, attn_mask=bias.to(heads[0].dtype))
        return self.proj(output.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _bias(self, boxes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Bias of the scores (B, heads, Q, h * w)."""
        rows, columns = grid
        if self.normalized_boxes:
            boxes = boxes * (boxes.new_tensor([columns, rows, columns, rows]) * self.stride)
        corners = bbox_cxcywh_to_xyxy(boxes)
        along_x = self.cpb_mlp1(self._distances(corners[..., 0::2], columns))
        along_y = self.cpb_mlp2(self._distances(corners[..., 1::2], rows))
        bias = along_y[:, :, :, None] + along_x[:, :, None]  # B, Q, h, w, heads
        return bias.permute(0, 4, 1, 2, 3).flatten(3)

    def _distances(self, edges: Tensor, count: int) -> Tensor:
        """Distances (B, Q, ``count``, 2) from pixel centres to a pair of edges (B, Q, 2)."""
        centres = (torch.arange(count, device=edges.device, dtype=edges.dtype) + 0.5) * self.stride
        return _SCALES[self.rpe_type](edges[:, :, None] - centres[:, None])


def _log_scale(distances: Tensor) -> Tensor:
    return distances.sign() * (distances.abs() + 1).log2() / log2(8)


_SCALES = {"linear": lambda distances: distances, "abs_log8": _log_scale}


def _bias_mlp(hidden_dims: int, num_heads: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2, hidden_dims), nn.ReLU(), nn.Linear(hidden_dims, num_heads, bias=False)
    )
