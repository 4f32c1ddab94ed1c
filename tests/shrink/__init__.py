"""Downstream configs made small: the one function through which their tests run them.

:func:`shrink` changes width, depth, number of queries or prototypes, crop and batch size, and
nothing else: types, losses, wiring and schedules stay those of the config. Weights are left out,
because no released file fits a small network.
"""

import copy
import importlib
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

# A tiny ViT and a tiny ConvNeXt with four layers; 16 channels a head, as RoPE needs multiples of 4.
WIDTH = 32
NUM_LAYERS = 4
VIT = {"embed_dims": WIDTH, "num_layers": NUM_LAYERS, "num_heads": 2}
CONVNEXT = {"depths": [1] * 4, "dims": [8, 16, 24, WIDTH]}
CROP = 64


def shrink(cfg: Config, job: str) -> Config:
    """A small copy of a downstream config.

    Args:
        cfg: config of a model on one of our backbones.
        job: 'classification', 'segmentation', 'detection' or 'depth'.

    Returns:
        The copy. Backbones are a ViT of width 32 or a ConvNeXt of widths 8, 16, 24, 32, four layers
        each, without weights; layers that are named (``out_indices``, ``interaction_indexes``) keep
        their order. Heads are those of ``tests.shrink.<job>``; batches hold two images.
    """
    cfg = copy.deepcopy(cfg)
    for backbone in every(cfg.model, "DINOv3ViT"):
        _shrink_backbone(backbone, VIT)
    for backbone in every(cfg.model, "DINOv3ConvNeXt"):
        _shrink_backbone(backbone, CONVNEXT)
    for part in every(cfg.model):
        for name in ("out_indices", "interaction_indexes"):
            if isinstance(part.get(name), (list, tuple)):
                part[name] = list(range(NUM_LAYERS))[-len(part[name]) :]
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if cfg.get(loader):
            cfg[loader].batch_size = min(cfg[loader].batch_size, 2)
    importlib.import_module(f"tests.shrink.{job}").__dict__[f"shrink_{job}"](cfg)
    return cfg


def every(part: Any, kind: str | None = None) -> Iterator[dict]:
    """The dicts inside a config, or those of one ``type``, outermost first."""
    if isinstance(part, dict):
        if kind is None or part.get("type") == kind:
            yield part
        for value in part.values():
            yield from every(value, kind)
    elif isinstance(part, (list, tuple)):
        for value in part:
            yield from every(value, kind)


def _shrink_backbone(backbone: dict, arch: dict) -> None:
    frozen = backbone.get("frozen_stages", -1)
    assert frozen in (-1, 0) or frozen >= NUM_LAYERS, f"frozen_stages={frozen} cannot be shrunk"
    backbone["arch"] = arch
    backbone["frozen_stages"] = NUM_LAYERS if frozen > 0 else frozen
    backbone["init_cfg"] = None
