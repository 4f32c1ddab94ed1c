"""Building blocks of the backbones; they know torch only."""

from .attention import ATTN_BACKENDS, MaskedKBiasLinear, Packing, SelfAttention
from .block import Block, ImageSubset, LayerScale, count_kept, draw_subset, draw_subsets
from .convnext_block import ConvNeXtBlock, PatchConv2d
from .feed_forward import FFN_LAYERS, FusedSwiGLU, Mlp, SwiGLU, build_ffn, ffn_hidden_dims
from .linear import Linear
from .norm import NORM_LAYERS, LayerNorm, RMSNorm, build_norm
from .patch_embed import PatchEmbed
from .position_embedding import resample_position_embedding
from .rope import RopeTables, RotaryEmbedding2D
from .rotation import SequenceShape, rotate_packed_qkv, split_packed_qkv

__all__ = [
    "ATTN_BACKENDS",
    "FFN_LAYERS",
    "NORM_LAYERS",
    "Block",
    "ConvNeXtBlock",
    "FusedSwiGLU",
    "ImageSubset",
    "LayerNorm",
    "LayerScale",
    "Linear",
    "MaskedKBiasLinear",
    "Mlp",
    "Packing",
    "PatchConv2d",
    "PatchEmbed",
    "RMSNorm",
    "RopeTables",
    "RotaryEmbedding2D",
    "SelfAttention",
    "SequenceShape",
    "SwiGLU",
    "build_ffn",
    "build_norm",
    "count_kept",
    "draw_subset",
    "draw_subsets",
    "ffn_hidden_dims",
    "resample_position_embedding",
    "rotate_packed_qkv",
    "split_packed_qkv",
]
