"""Decoder of Plain-DETR: pre-norm layers that refine boxes (arXiv 2308.01904)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .boxes import refine_boxes
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
