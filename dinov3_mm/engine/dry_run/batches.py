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
from dinov3_mm.errors import ConfigError

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
        rank: that rank; of a student in a rank group its position in the group.
        group: ranks of the student's group; None where students are not in groups.
        student_images: images that a student learns from in a micro batch: those of the rank, or
            its part of those of all ranks.
    """

    global_size: int
    local_size: int
    gram_size: int | None
    num_local: int
    images: int
    ratio: float
    num_masked: int
    rank: int
    group: int | None
    student_images: int

    def __str__(self) -> str:
        gram = "" if self.gram_size is None else f", Gram {self.gram_size}"
        return f"global {self.global_size}, local {self.local_size}{gram}"


def crop_sets(cfg: Config, world_size: int, share: tuple[int, int] | None = None) -> list[CropSet]:
    """The sets of crop sizes of a completed config.

    Args:
        cfg: completed config.
        world_size: number of ranks.
        share: of students in rank groups the rank's position in its group, and the group's ranks.

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
        if share is None and layout.micro_batch_size % world_size:
            raise ValueError(
                "surplus=True is for students in rank groups; use a global batch that "
                f"{world_size} ranks divide"
            )
        ratios = getattr(transform, "ratios", [1.0])
        group = None if share is None else share[1]
        return [
            _crop_set(variant, ratio, layout, group, cfg)
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


def _crop_set(
    variant: Any, ratio: float, layout: BatchLayout, group: int | None, cfg: Config
) -> CropSet:
    masking = dict(cfg.train_dataloader["masking"])
    masking.pop("patch_size")
    settings = {key.removeprefix("mask_"): value for key, value in masking.items()}
    planner = MaskPlanner(variant.global_size, _patch_sizes(cfg)[0], **settings)
    seed, whole = cfg.randomness["seed"], layout.micro_batch_size
    parts = layout.world_size if group is None else group
    images = whole // parts
    hidden = [planner.num_hidden(seed, 0, part * images, images, whole) for part in range(parts)]
    return CropSet(
        variant.global_size,
        variant.local_size,
        variant.gram_size,
        variant.num_local,
        layout.rank_batch_size,
        ratio,
        max(hidden),
        hidden.index(max(hidden)),
        group,
        images,
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
    first = 0
    if crops.group is None:
        first = crops.rank * crops.images
    else:
        collate.mask_share = (crops.rank, crops.group)
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
    rows = []
    for key, value in batch.items():
        if isinstance(value, Tensor):
            shape = " x ".join(map(str, value.shape))
            rows.append((key, shape, str(value.dtype).removeprefix("torch.")))
        elif key == "masks_of":
            for stride, masks in value.items():
                inner = describe_batch(masks)
                rows += [(f"{name}, stride {stride}", *rest) for name, *rest in inner]
    return rows
