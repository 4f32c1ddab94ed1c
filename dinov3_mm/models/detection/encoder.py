"""mmdet's DETR encoder as the released detector has it; attention weights are not stored."""

from mmdet.models.layers import DetrTransformerEncoder
from torch import Tensor, nn


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
