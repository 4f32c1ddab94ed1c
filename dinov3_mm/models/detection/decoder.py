"""Decoder of Plain-DETR: pre-norm layers that refine boxes (arXiv 2308.01904)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mmdet.structures.bbox import bbox_xyxy_to_cxcywh
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .rpe_attention import BoxRPECrossAttention


@dataclass
class BoxPredictions:
    """What a layer predicts; boxes are centre and size in pixels.

    Attributes:
        logits: class logits (B, Q, C).
        boxes: boxes (B, Q, 4).
        references: boxes that were refined (B, Q, 4).
        deltas: how (B, Q, 4).
    """

    logits: Tensor
    boxes: Tensor
    references: Tensor
    deltas: Tensor

    def select(self, queries: slice) -> "BoxPredictions":
        """Predictions of some of the queries."""
        return BoxPredictions(
            *(x[:, queries] for x in (self.logits, self.boxes, self.references, self.deltas))
        )


@dataclass
class Memory:
    """The map that queries look at: tokens and positions (B, h * w, D), mask (B, h * w), (h, w)."""

    tokens: Tensor
    position: Tensor
    padding_mask: Tensor | None
    grid: tuple[int, int]


class BoxRefinementDecoder(nn.Module):
    """Layers after each of which boxes are refined.

    Args:
        num_layers: layers.
        embed_dims: channels.
        num_heads: heads.
        ffn_dims: hidden width of the FFN.
        with_cp: recompute layers in the backward pass instead of storing their activations.
        rpe: further arguments of :class:`BoxRPECrossAttention`.
    """

    def __init__(
        self,
        num_layers: int,
        embed_dims: int,
        num_heads: int,
        ffn_dims: int,
        *,
        with_cp: bool = False,
        rpe: dict | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            BoxRefinementLayer(embed_dims, num_heads, ffn_dims, rpe=rpe) for _ in range(num_layers)
        )
        self.final_layer_norm = nn.LayerNorm(embed_dims)
        self.with_cp = with_cp

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        references: Tensor,
        memory: Memory,
        *,
        image_sizes: Tensor,
        bbox_embed: Sequence[nn.Module],
        class_embed: Sequence[nn.Module],
        attn_mask: Tensor | None = None,
    ) -> list[BoxPredictions]:
        """Predict boxes.

        A layer starts from the boxes of the layer before without their gradient, while the boxes
        that it returns pass the gradient on to that layer ("look forward twice", arXiv 2203.03605).

        Args:
            query, query_pos: (B, Q, D).
            references: boxes to start from (B, Q, 4).
            memory: what to look at.
            image_sizes: width and height that boxes are clipped to, (B, 2).
            bbox_embed, class_embed: layers that give offsets and logits, one of each a layer.
            attn_mask: True where a query must not see another, (Q, Q).

        Returns:
            Predictions of each layer.
        """
        limits = image_sizes[:, None]
        outputs, previous = [], references
        for layer, to_deltas, to_logits in zip(self.layers, bbox_embed, class_embed):
            arguments = (query, query_pos, references, memory, attn_mask)
            if self.with_cp and torch.is_grad_enabled():
                query = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                query = layer(*arguments)
            normed = self.final_layer_norm(query)
            deltas = to_deltas(normed).float()
            boxes = refine_boxes(previous, deltas, limits)
            outputs.append(BoxPredictions(to_logits(normed).float(), boxes, previous, deltas))
            previous = refine_boxes(references, deltas, limits)
            references = previous.detach()
        return outputs


class BoxRefinementLayer(nn.Module):
    """Self-attention, cross-attention to the map, FFN; each behind a norm.

    Args:
        embed_dims, num_heads, ffn_dims, rpe: see :class:`BoxRefinementDecoder`.
    """

    def __init__(
        self, embed_dims: int, num_heads: int, ffn_dims: int, *, rpe: dict | None = None
    ) -> None:
        super().__init__()
        self.cross_attn = BoxRPECrossAttention(embed_dims, num_heads, **(rpe or {}))
        self.norm1 = nn.LayerNorm(embed_dims)
        self.self_attn = nn.MultiheadAttention(embed_dims, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.linear1 = nn.Linear(embed_dims, ffn_dims)
        self.linear2 = nn.Linear(ffn_dims, embed_dims)
        self.norm3 = nn.LayerNorm(embed_dims)

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        references: Tensor,
        memory: Memory,
        attn_mask: Tensor | None,
    ) -> Tensor:
        """Queries (B, Q, D) after the layer; arguments as in :class:`BoxRefinementDecoder`."""
        x = self.norm2(query)
        placed = x + query_pos
        query = (
            query + self.self_attn(placed, placed, x, attn_mask=attn_mask, need_weights=False)[0]
        )
        query = query + self.cross_attn(
            self.norm1(query) + query_pos,
            references,
            memory.tokens + memory.position,
            memory.tokens,
            memory.grid,
            memory.padding_mask,
        )
        return query + self.linear2(self.linear1(self.norm3(query)).relu())


# --- Boxes as offsets from reference boxes, in absolute pixels (Plain-DETR, arXiv 2308.01904) ---
#
# Boxes are centre x, centre y, width, height in pixels unless a name says otherwise.


# exp() of a size offset stays within 16/1000 and 1000/16.
MAX_SIZE_OFFSET = abs(math.log(16 / 1000))
# Keeps the offsets of a target finite where the reference box is empty.
_SIZE_EPS = 0.1
_TEMPERATURE = 10000


def refine_boxes(references: Tensor, deltas: Tensor, limits: Tensor | None = None) -> Tensor:
    """Move and scale reference boxes.

    Args:
        references: boxes (..., 4).
        deltas: offsets (..., 4): of the centre in units of the reference's size, and of the
            logarithm of the size, which is held within :data:`MAX_SIZE_OFFSET`.
        limits: width and height that corners are clipped to, broadcastable to (..., 2); None does
            not clip.

    Returns:
        Boxes (..., 4).
    """
    sizes = references[..., 2:]
    centres = references[..., :2] + sizes * deltas[..., :2]
    sizes = sizes * deltas[..., 2:].clamp(-MAX_SIZE_OFFSET, MAX_SIZE_OFFSET).exp()
    if limits is None:
        return torch.cat((centres, sizes), dim=-1)
    low, high = centres - 0.5 * sizes, centres + 0.5 * sizes
    zero = limits.new_zeros(())
    corners = [torch.minimum(torch.maximum(corner, zero), limits) for corner in (low, high)]
    return bbox_xyxy_to_cxcywh(torch.cat(corners, dim=-1))


def box_deltas(references: Tensor, targets: Tensor) -> Tensor:
    """Offsets that lead from reference boxes to target boxes.

    Args:
        references: boxes (..., 4).
        targets: boxes (..., 4) with positive sizes.

    Returns:
        Offsets (..., 4) as :func:`refine_boxes` takes them; 0.1 px are added to the sizes of the
        references.
    """
    sizes = references[..., 2:] + _SIZE_EPS
    return torch.cat(
        (
            (targets[..., :2] - references[..., :2]) / sizes,
            (targets[..., 2:] / sizes).log(),
        ),
        dim=-1,
    )


def embed_boxes(boxes: Tensor, num_feats: int) -> Tensor:
    """Sine embedding of the four numbers of each box, times 2 pi and otherwise as they are.

    Args:
        boxes: boxes (..., 4).
        num_feats: features of each number, even.

    Returns:
        (..., 4 * ``num_feats``): the numbers in their order, sine and cosine in turn.
    """
    index = torch.arange(num_feats, dtype=torch.float32, device=boxes.device)
    periods = _TEMPERATURE ** (2 * (index // 2) / num_feats)
    angles = (boxes * (2 * math.pi))[..., None] / periods
    waves = torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1)
    return waves.flatten(-3)
