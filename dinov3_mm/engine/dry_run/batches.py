"""Batches as the loader would give them, without images."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import TRANSFORMS
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dinov3_mm.datasets import BatchLayout, MaskPlanner, MultiCropCollate
from dinov3_mm.datasets.loader import check_sizes
from dinov3_mm.engine.config import ConfigError

NUM_GLOBAL_CROPS = 2


@dataclass(frozen=True)
class CropSet:
    """One set of crop sizes and what a rank gets of it.

    Attributes:
        global_size: pixels.
        local_size: pixels.
        gram_size: pixels; None without Gram crops.
        num_local: local crops per image.
        images: of a rank's micro batch.
        ratio: share of the iterations.
        num_masked: hidden patches of the rank that has most, in the first iteration.
        rank: that rank.
    """

    global_size: int
    local_size: int
    gram_size: int | None
    num_local: int
    images: int
    ratio: float
    num_masked: int
    rank: int

    def __str__(self) -> str:
        gram = "" if self.gram_size is None else f", Gram {self.gram_size}"
        return f"global {self.global_size}, local {self.local_size}{gram}"


def crop_sets(cfg: Config, world_size: int) -> list[CropSet]:
    """The sets of crop sizes of a completed config.

    Raises:
        ConfigError: sizes that the patch size does not divide, a batch that the ranks do not
            divide, or a bad argument of the transform or of the masks.
    """
    loader = cfg.train_dataloader
    try:
        transform = TRANSFORMS.build(
            {"type": "MultiCrop", **copy.deepcopy(dict(loader.get("transform", {})))}
        )
        for variant in transform.variants:
            for patch_size in _patch_sizes(cfg):
                check_sizes(variant, patch_size)
        layout = batch_layout(cfg, world_size)
        ratios = getattr(transform, "ratios", [1.0])
        return [
            _crop_set(variant, ratio, layout, cfg)
            for variant, ratio in zip(transform.variants, ratios, strict=True)
        ]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"train_dataloader: {error}") from error


def batch_layout(cfg: Config, world_size: int) -> BatchLayout:
    """How the global batch is cut into micro batches and ranks."""
    train_cfg = cfg.train_cfg
    return BatchLayout(
        train_cfg["global_batch_size"],
        world_size,
        train_cfg.get("accumulate", 1),
        surplus=train_cfg.get("surplus", False),
    )


def _patch_sizes(cfg: Config) -> list[int]:
    given = cfg.train_dataloader["masking"]["patch_size"]
    return [given] if isinstance(given, int) else list(given)


def _crop_set(variant: Any, ratio: float, layout: BatchLayout, cfg: Config) -> CropSet:
    masking = dict(cfg.train_dataloader["masking"])
    masking.pop("patch_size")
    settings = {key.removeprefix("mask_"): value for key, value in masking.items()}
    planner = MaskPlanner(variant.global_size, _patch_sizes(cfg)[0], **settings)
    seed, images, whole = cfg.randomness["seed"], layout.rank_batch_size, layout.micro_batch_size
    hidden = [
        planner.num_hidden(seed, 0, rank * images, images, whole)
        for rank in range(layout.world_size)
    ]
    return CropSet(
        variant.global_size,
        variant.local_size,
        variant.gram_size,
        variant.num_local,
        images,
        ratio,
        max(hidden),
        hidden.index(max(hidden)),
    )


def make_batch(cfg: Config, crops: CropSet, channels: int) -> dict[str, Any]:
    """A micro batch of a rank: 8-bit crops of zeros and the masks of the first iteration.

    Under ``FakeTensorMode`` the crops have no storage.
    """
    collate = MultiCropCollate(
        crops.global_size,
        **cfg.train_dataloader["masking"],
        seed=cfg.randomness["seed"],
        global_batch_size=cfg.train_cfg["global_batch_size"],
        accumulate=cfg.train_cfg.get("accumulate", 1),
    )
    first = crops.rank * crops.images
    # The collate function plans the masks by the last side of a crop; the rest is replaced.
    crop = np.zeros((1, 1, crops.global_size), np.uint8)
    planned = collate(
        [
            {"position": first + index, "global_crops": [crop], "broken": []}
            for index in range(crops.images)
        ]
    )
    batch = {key: value for key, value in planned.items() if isinstance(value, (Tensor, Mapping))}
    sizes = {
        "global_crops": (NUM_GLOBAL_CROPS, crops.global_size),
        "local_crops": (crops.num_local, crops.local_size),
        "gram_crops": (NUM_GLOBAL_CROPS, crops.gram_size),
    }
    for key, (count, side) in sizes.items():
        if side is not None:
            shape = (count * crops.images, channels, side, side)
            batch[key] = torch.zeros(shape, dtype=torch.uint8)
    return tree_map_only(Tensor, torch.clone, batch)


def describe_batch(batch: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, shape and dtype of each tensor of a batch."""
    return [
        (key, " x ".join(map(str, value.shape)), str(value.dtype).removeprefix("torch."))
        for key, value in batch.items()
        if isinstance(value, Tensor)
    ]
