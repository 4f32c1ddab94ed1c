"""DINOv2 of transformers and timm, every parameter redrawn, and the backbones from their files."""

import timm
import torch
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from dinov3_mm.checkpoints import build_backbone
from dinov3_mm.models.backbones import DINOv2ViT
from tests.checkpoints.toys import redraw

_TOY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
GATED = {"use_swiglu_ffn": True}


def hf_model(registers: int = 0, **changes) -> nn.Module:
    """A model of transformers; ``changes`` go to its configuration."""
    settings = {**_TOY, **changes}
    if registers:
        config = Dinov2WithRegistersConfig(**settings, num_register_tokens=registers)
        return redraw(Dinov2WithRegistersModel(config))
    return redraw(Dinov2Model(Dinov2Config(**settings)))


def saved_and_built(model: nn.Module, folder) -> DINOv2ViT:
    """The backbone from the folder that transformers writes."""
    model.save_pretrained(folder)
    return build_backbone(folder)


def timm_model(name: str) -> nn.Module:
    """A toy of the timm model ``name`` that takes images of any size."""
    ratio = {"mlp_ratio": 5.5} if "giant" in name else {}
    sizes = {"embed_dim": 64, "depth": 3, "num_heads": 1, "patch_size": 4, "img_size": 16}
    return redraw(timm.create_model(name, dynamic_img_size=True, **sizes, **ratio))


def timm_saved_and_built(model: nn.Module, path) -> DINOv2ViT:
    """The backbone from a state dict of timm."""
    torch.save(model.state_dict(), path)
    return build_backbone(path)
