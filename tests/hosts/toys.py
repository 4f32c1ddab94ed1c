"""Toy models of the hosts, built the way a user's config builds them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from dinov3_mm.checkpoints import export_backbone
from tests.checkpoints.toys import TOY_ARCH, toy_backbone

DIMS = TOY_ARCH["embed_dims"]
PATCH = 8
IMPORTS = {"imports": ["dinov3_mm", "dinov3_mm.hosts"]}
STATISTICS = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}


def backbone_config(folder: Path, **arguments) -> dict:
    """A frozen toy backbone that loads the weights of ``toy_backbone(1)`` from a file."""
    path = export_backbone(toy_backbone(1), folder / "backbone.safetensors")
    return {
        "type": "DINOv3ViT",
        "arch": TOY_ARCH,
        "patch_size": PATCH,
        "frozen_stages": TOY_ARCH["num_layers"],
        "init_cfg": {"type": "DINOv3Pretrained", "checkpoint": str(path)},
        **arguments,
    }


def build_model(scope: str, model: dict, folder: Path) -> nn.Module:
    """Write a config file, read it back as a host's tool does, build and initialise its model."""
    path = folder / "config.py"
    Config({"default_scope": scope, "custom_imports": IMPORTS, "model": model}).dump(path)
    config = Config.fromfile(path)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        built = MODELS.build(config.model)
        built.init_weights()
    return built


def images(count: int = 2, size: int = 64) -> list[Tensor]:
    """Images (3, size, size) of uint8, as a host's pipeline packs them."""
    generator = torch.Generator().manual_seed(3)
    shape = (count, 3, size, size)
    return list(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))


def normalised(batch: list[Tensor]) -> Tensor:
    """The same images as the backbone sees them; the toy files are taken for BGR."""
    x = torch.stack(batch).flip(1).float()
    mean, std = (torch.tensor(values)[:, None, None] for values in STATISTICS.values())
    return (x - mean) / std


def run(model: nn.Module, samples: list) -> SimpleNamespace:
    """One training step's losses with their backward pass, then a prediction."""
    data = {"inputs": images(len(samples)), "data_samples": samples}
    model.train()
    losses = model(**model.data_preprocessor(data, True), mode="loss")
    total, _ = model.parse_losses(losses)
    total.backward()
    model.eval()
    with torch.no_grad():
        predictions = model(**model.data_preprocessor(data, False), mode="predict")
    return SimpleNamespace(losses=losses, total=total.item(), predictions=predictions)


def assert_backbone_is_frozen_and_loaded(backbone: nn.Module) -> None:
    """Check features against the model whose file was loaded, and that training left it alone."""
    with torch.no_grad():
        x = normalised(images())
        assert torch.equal(backbone(x)[-1], toy_backbone(1, out_type=backbone.out_type)(x)[-1])
    backbone.train()
    assert not any(module.training for block in backbone.blocks for module in block.modules())
    assert all(parameter.grad is None for parameter in backbone.parameters())


def assert_trains(*modules: nn.Module) -> None:
    """Check that every parameter got a finite gradient."""
    for module in modules:
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and np.isfinite(parameter.grad.sum()), name
