"""One training step and one prediction of a downstream config, small, on random images."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import nn

from tests.shrink import every, shrink

CONFIGS = Path(__file__).parents[2] / "configs"
BACKBONES = ("DINOv3ViT", "DINOv3ConvNeXt")


def configs_of(job: str) -> list:
    """The configs of a folder, as parameters of a test."""
    paths = sorted((CONFIGS / job).glob("*.py"))
    assert paths, f"no configs in configs/{job}"
    return [pytest.param(path, id=path.stem) for path in paths]


def check_config(path: Path, job: str, make_batch) -> None:
    """Build, train a step, predict.

    Args:
        path: config file.
        job: folder that it lies in.
        make_batch: gives ``{'inputs': [...], 'data_samples': [...]}`` for a shrunk config.
    """
    cfg = shrink(Config.fromfile(path), job)
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
        _build_datasets(cfg)
        torch.manual_seed(0)
        model = MODELS.build(cfg.model)
        model.init_weights()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        losses = _train(model, cfg, make_batch(cfg))
        _check_training(model, before, losses, cfg)
        model.eval()
        batch = make_batch(cfg)
        with torch.no_grad():
            predictions = model.test_step(batch)
    assert len(predictions) == len(batch["inputs"])


def _build_datasets(cfg: Config) -> None:
    """Datasets and pipelines build by their names and arguments; no file is read."""
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for dataset in every(cfg.get(loader) or {}):
            if "pipeline" in dataset and "type" in dataset and "dataset" not in dataset:
                DATASETS.build({**dataset, "lazy_init": True})
    if "tta_pipeline" in cfg:
        Compose(cfg.tta_pipeline)
        MODELS.build({**cfg.tta_model, "module": cfg.model})


def _train(model: nn.Module, cfg: Config, batch: dict) -> dict:
    # Steps of a warm-up would be too small to see.
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    model.train()
    return model.train_step(batch, wrapper)


def _check_training(model: nn.Module, before: dict, losses: dict, cfg: Config) -> None:
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in losses.values()), losses
    frozen = {
        name
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and "backbone" in name
    }
    after = model.state_dict()
    for name in frozen:
        assert torch.equal(after[name], before[name]), name
    moved = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not torch.equal(parameter, before[name])
    ]
    assert moved, "nothing trains"
    is_frozen = any(
        part.get("frozen_stages", -1) > 0 for kind in BACKBONES for part in every(cfg.model, kind)
    )
    assert bool(frozen) == is_frozen
