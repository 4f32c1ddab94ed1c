"""Building blocks of the backbones; they know torch only."""

from .attention import MaskedKBiasLinear, RopeTables, SelfAttention, SequenceShape
from .block import Block, ImageSubset, LayerScale, draw_subset
from .feed_forward import FFN_LAYERS, Mlp, SwiGLU, build_ffn, ffn_hidden_dims
from .norm import NORM_LAYERS, LayerNorm, RMSNorm, build_norm
from .patch_embed import PatchEmbed
from .rope import RotaryEmbedding2D, rotate

__all__ = [
    "FFN_LAYERS",
    "NORM_LAYERS",
    "Block",
    "ImageSubset",
    "LayerNorm",
    "LayerScale",
    "MaskedKBiasLinear",
    "Mlp",
    "PatchEmbed",
    "RMSNorm",
    "RopeTables",
    "RotaryEmbedding2D",
    "SelfAttention",
    "SequenceShape",
    "SwiGLU",
    "build_ffn",
    "build_norm",
    "draw_subset",
    "ffn_hidden_dims",
    "rotate",
]
