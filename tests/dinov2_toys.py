"""Small DINOv2 models of this project and of transformers, every parameter redrawn."""

import torch
from torch import Tensor

from dinov3_mm.models.backbones import DINOv2ViT
from tests.checkpoints.toys import redraw

SIZES = {"embed_dims": 32, "num_layers": 2, "num_heads": 2}
REGISTERS = {"num_registers": 4, "interpolate_offset": 0.0, "interpolate_antialias": True}
# Patches of 4 pixels, position embedding of 4 x 4 patches.
GEOMETRY = {"patch_size": 4, "img_size": 16}
# At the trained grid, smaller, larger, and not square.
IMAGE_SIZES = ((16, 16), (8, 8), (28, 24), (12, 40))


def toy_dinov2(seed: int = 0, **arguments) -> DINOv2ViT:
    """A toy in eval mode; ``arguments`` go to its constructor."""
    backbone = DINOv2ViT(arch=SIZES, **{**GEOMETRY, **arguments})
    backbone.init_weights()
    return redraw(backbone, seed)


def toy_of_released(name: str) -> DINOv2ViT:
    """A released architecture with two blocks of width 64."""
    arch = {**DINOv2ViT.arch_zoo[name], **SIZES, "embed_dims": 64, "num_heads": 1, **GEOMETRY}
    return redraw(DINOv2ViT(arch=arch))


def noise(height: int, width: int, batch: int = 2) -> Tensor:
    """Normalised images (batch, 3, height, width)."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(7))


def all_tokens(backbone: DINOv2ViT, images: Tensor, mask: Tensor | None = None) -> Tensor:
    """CLS, registers and patches after the final norm, (B, 1 + R + N, D)."""
    tokens = backbone.forward_tokens(images, mask)
    return torch.cat((tokens.cls[:, None], tokens.registers, tokens.patches), dim=1)
