"""Backbones that export in seconds, and the statistics of their input."""

from dinov3_mm.checkpoints import Statistics
from dinov3_mm.models.backbones import DINOv3ConvNeXt, DINOv3ViT
from tests.checkpoints.toys import redraw

STATISTICS = Statistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
NARROW = {"embed_dims": 16, "num_layers": 1, "num_heads": 2, "num_registers": 2, "ffn_ratio": 2.0}


def narrow_vit(**arguments) -> DINOv3ViT:
    """A redrawn ViT of one block, patch 16, two registers."""
    backbone = DINOv3ViT(NARROW, patch_size=16, **arguments)
    backbone.init_weights()
    return redraw(backbone)


def narrow_convnext() -> DINOv3ConvNeXt:
    """A redrawn ConvNeXt of one block a stage."""
    arch = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16]}
    backbone = DINOv3ConvNeXt(arch, layer_scale_init_value=0.5)
    backbone.init_weights()
    return redraw(backbone)


def dimensions(value) -> list[str | int]:
    """Names or lengths of the dimensions of an input or output of an ONNX graph."""
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
