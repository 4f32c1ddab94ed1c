"""Learned queries that gather a set of tokens by cross-attention."""

import torch
from torch import Tensor, nn


class AttentivePooling(nn.Module):
    """Pooling by cross-attention, after any number of self-attention layers.

    Layers before the last are pre-norm transformer layers over the tokens. The last one lets
    learned queries q attend to the tokens x: ``q + attention(q, norm(x), norm(x))``, then
    ``q + ffn(norm(q))``. The four-layer attentive probe of video features is ``num_layers=4``. Of
    positions it knows what the tokens know.

    Args:
        dims: width of the tokens.
        num_heads: attention heads.
        num_layers: layers, the one of the queries included.
        num_queries: learned queries.
        ffn_ratio: hidden width of the feed-forward networks over ``dims``.

    Raises:
        ValueError: if the heads do not divide the width, or there is no layer or query.
    """

    def __init__(
        self,
        dims: int,
        *,
        num_heads: int,
        num_layers: int = 1,
        num_queries: int = 1,
        ffn_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dims % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {dims}")
        if num_layers < 1 or num_queries < 1:
            raise ValueError(
                f"num_layers is {num_layers} and num_queries {num_queries}; expected 1 or more"
            )
        hidden = int(dims * ffn_ratio)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dims,
                num_heads,
                hidden,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(num_layers - 1)
        )
        self.query = nn.Parameter(torch.zeros(1, num_queries, dims))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.token_norm = nn.LayerNorm(dims)
        self.attention = nn.MultiheadAttention(dims, num_heads, batch_first=True)
        self.query_norm = nn.LayerNorm(dims)
        self.ffn = nn.Sequential(nn.Linear(dims, hidden), nn.GELU(), nn.Linear(hidden, dims))

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool.

        Args:
            tokens: (B, N, ``dims``).

        Returns:
            (B, ``num_queries``, ``dims``).
        """
        for layer in self.layers:
            tokens = layer(tokens)
        tokens = self.token_norm(tokens)
        query = self.query.expand(len(tokens), -1, -1)
        query = query + self.attention(query, tokens, tokens, need_weights=False)[0]
        return query + self.ffn(self.query_norm(query))
