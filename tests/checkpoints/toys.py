"""Small models with every parameter redrawn, so that no converted tensor can hide."""

import torch
from torch import Tensor, nn

from dinov3_mm.models.backbones import DINOv3ViT

TOY_ARCH = {"embed_dims": 32, "num_layers": 2, "num_heads": 2, "ffn_ratio": 2.0, "num_registers": 2}


@torch.no_grad()
def redraw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew: scales in U(0.5, 1.5), biases and tokens of visible size."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        scale = name.endswith(("gamma", "gamma_1", "gamma_2", "lambda1", "g"))
        if scale or ("norm" in name and name.endswith("weight")):
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            spread = parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.5
            parameter.normal_(std=spread, generator=generator)
    return module.eval()


def toy_backbone(seed: int = 0, **arguments) -> DINOv3ViT:
    """A toy DINOv3ViT (patch 8, width 32) in eval mode; ``arguments`` go to its constructor."""
    backbone = DINOv3ViT(arch=TOY_ARCH, **{"patch_size": 8, **arguments})
    backbone.init_weights()
    return redraw(backbone, seed)


def quickstart_backbone() -> DINOv3ViT:
    """A backbone of the architecture in ``configs/_base_/backbones/quickstart.py``, redrawn."""
    arch = {"embed_dims": 96, "num_layers": 4, "num_heads": 3, "num_registers": 1}
    backbone = DINOv3ViT(arch=arch, patch_size=8, layer_scale_init_value=1.0)
    backbone.init_weights()
    return redraw(backbone, 3)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state, to prove later that nothing touched it."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert equal names, dtypes and bits."""
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def toy_images(size: int = 32, batch: int = 2) -> Tensor:
    """Normalised images (batch, 3, size, size)."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(7))
