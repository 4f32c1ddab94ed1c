"""Encoder, proposals and decoder of the released detector."""

from collections.abc import Sequence

import torch
from mmdet.models.layers import DetrTransformerEncoder
from torch import Tensor, nn

from .decoder import BoxPredictions, BoxRefinementDecoder, Memory, embed_boxes, refine_boxes
from .proposals import ProposalPyramid

# --- The encoder: mmdet's, without stored attention weights ---


class _LeanAttention(nn.MultiheadAttention):
    """Attention without its weights, which mmcv asks for and drops: (h * w)^2 numbers a head."""

    def forward(self, *args, **kwargs) -> tuple[Tensor, None]:
        return super().forward(*args, need_weights=False, **kwargs)


def build_encoder(
    embed_dims: int, num_heads: int, ffn_dims: int, num_layers: int, dropout: float
) -> DetrTransformerEncoder:
    """Post-norm layers with ReLU.

    Args:
        embed_dims: channels.
        num_heads: heads.
        ffn_dims: hidden width of the FFN.
        num_layers: layers.
        dropout: dropout in and after the FFN and after the attention; its weights have none.
    """
    encoder = DetrTransformerEncoder(
        num_layers=num_layers,
        layer_cfg={
            "self_attn_cfg": {
                "embed_dims": embed_dims,
                "num_heads": num_heads,
                "dropout_layer": {"type": "Dropout", "drop_prob": dropout},
            },
            "ffn_cfg": {
                "embed_dims": embed_dims,
                "feedforward_channels": ffn_dims,
                "ffn_drop": dropout,
                "act_cfg": {"type": "ReLU", "inplace": True},
            },
        },
    )
    for layer in encoder.layers:
        layer.self_attn.attn = _LeanAttention(embed_dims, num_heads)
    return encoder


# --- All of it ---


class PlainDETRTransformer(nn.Module):
    """From one map and its padding to boxes, in two stages (arXiv 2308.01904).

    The first stage refines a proposal at each position of a pyramid. Those of the highest
    objectness, the first class logit, are the boxes that the queries start from; the queries
    themselves are learnt ("mixed selection", arXiv 2203.03605).

    Args:
        embed_dims: channels.
        num_heads: heads.
        encoder_ffn_dims, decoder_ffn_dims: hidden widths of the FFNs.
        num_encoder_layers, num_decoder_layers: layers.
        stride: stride of the map in pixels.
        proposal_strides, min_proposal_size: see :class:`ProposalPyramid`.
        encoder_dropout: dropout of the encoder; the decoder has none.
        rpe_hidden_dims, rpe_type: see :class:`BoxRPECrossAttention`.
        with_cp: recompute decoder layers in the backward pass.
    """

    def __init__(
        self,
        *,
        embed_dims: int,
        num_heads: int,
        encoder_ffn_dims: int,
        decoder_ffn_dims: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        stride: int,
        proposal_strides: Sequence[int],
        min_proposal_size: float,
        encoder_dropout: float,
        rpe_hidden_dims: int,
        rpe_type: str,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(1, embed_dims))
        self.encoder = build_encoder(
            embed_dims, num_heads, encoder_ffn_dims, num_encoder_layers, encoder_dropout
        )
        self.enc_output_proj = ProposalPyramid(
            embed_dims, in_stride=stride, strides=proposal_strides, min_size=min_proposal_size
        )
        self.enc_output = nn.Linear(embed_dims, embed_dims)
        self.enc_output_norm = nn.LayerNorm(embed_dims)
        self.pos_trans = nn.Linear(2 * embed_dims, 2 * embed_dims)
        self.pos_trans_norm = nn.LayerNorm(2 * embed_dims)
        self.decoder = BoxRefinementDecoder(
            num_decoder_layers,
            embed_dims,
            num_heads,
            decoder_ffn_dims,
            with_cp=with_cp,
            rpe={"hidden_dims": rpe_hidden_dims, "stride": stride, "rpe_type": rpe_type},
        )

    def reset_parameters(self) -> None:
        """Matrices Xavier uniform, linears of the decoder N(0, 0.02), level embedding N(0, 1)."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.level_embed)
        for module in self.decoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, features: Tensor, mask: Tensor | None, position: Tensor) -> Memory:
        """Encode a map.

        Args:
            features: (B, D, h, w).
            mask: True on padding, (B, h, w); None without padding, which is faster.
            position: position encoding (B, D, h, w).
        """
        position = position.flatten(2).transpose(1, 2) + self.level_embed[0]
        padding = None if mask is None else mask.flatten(1)
        tokens = features.flatten(2).transpose(1, 2)
        tokens = self.encoder(query=tokens, query_pos=position, key_padding_mask=padding)
        return Memory(tokens, position, padding, features.shape[-2:])

    def forward(
        self,
        memory: Memory,
        queries: Tensor,
        *,
        num_one2one: int,
        bbox_embed: Sequence[nn.Module],
        class_embed: Sequence[nn.Module],
    ) -> tuple[list[BoxPredictions], BoxPredictions]:
        """Predict boxes.

        Args:
            memory: encoded map.
            queries: learnt content of the queries (Q, D). With fewer proposals than queries the
                last queries are left out.
            num_one2one: queries before this and those after it do not see each other.
            bbox_embed, class_embed: one more than decoder layers; the last belongs to the
                proposals.

        Returns:
            Predictions of each decoder layer, and of all proposals.
        """
        mask = memory.padding_mask
        if mask is None:
            mask = torch.zeros(memory.tokens.shape[:2], dtype=torch.bool, device=queries.device)
        pyramid = self.enc_output_proj(
            memory.tokens.transpose(1, 2).unflatten(2, memory.grid).contiguous(),
            mask.unflatten(1, memory.grid),
        )
        tokens = self.enc_output_norm(self.enc_output(pyramid.tokens))
        logits, deltas = class_embed[-1](tokens).float(), bbox_embed[-1](tokens).float()
        boxes = refine_boxes(pyramid.boxes, deltas, pyramid.image_sizes[:, None])
        first = BoxPredictions(logits, boxes, pyramid.boxes, deltas)
        count = min(len(queries), logits.shape[1])
        best = logits[..., 0].topk(count, dim=1).indices
        references = boxes.detach().gather(1, best[..., None].expand(-1, -1, 4))
        outputs = self.decoder(
            queries[:count].expand(len(logits), -1, -1),
            self._query_position(references),
            references,
            memory,
            image_sizes=pyramid.image_sizes,
            bbox_embed=bbox_embed[:-1],
            class_embed=class_embed[:-1],
            attn_mask=_split_mask(count, num_one2one, logits.device),
        )
        return outputs, first

    def _query_position(self, references: Tensor) -> Tensor:
        embed_dims = self.level_embed.shape[1]
        waves = embed_boxes(references, embed_dims // 2)
        return self.pos_trans_norm(self.pos_trans(waves))[..., :embed_dims]


def _split_mask(count: int, num_one2one: int, device: torch.device) -> Tensor | None:
    if count <= num_one2one:
        return None
    is_second = torch.arange(count, device=device) >= num_one2one
    return is_second[:, None] != is_second
