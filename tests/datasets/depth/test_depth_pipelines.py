"""The pipelines of the depth configs on files, with mmseg's transforms between ours."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope

import dinov3_mm.hosts  # noqa: F401  (before mmseg)
from tests.golden import load_golden
from tests.hosts.lane import require_hosts

require_hosts()

CONFIGS = Path(__file__).parents[3] / "configs/depth"
# Config, size of its images, size of what it trains on, depth units in a metre.
SOURCES = [
    ("linear_vits16_nyu", (480, 640), (416, 544), 1000),
    ("linear_vits16_kitti", (375, 1242), (352, 704), 256),
    ("linear_vits16_folder", (480, 640), (416, 544), 1000),
    ("dpt_vitb16_relative", (600, 700), (768, 1024), 1000),
    ("chmv2_vitl16sat", (500, 600), (448, 448), 1),
]


def write_pair(root: Path, image: str, depth: str, size: tuple[int, int], scale: int) -> None:
    for path in (root / image, root / depth):
        path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.tile(np.linspace(1, 6, size[1]), (size[0], 1))
    cv2.imwrite(str(root / image), np.repeat((ramp * 40)[..., None], 3, 2).astype(np.uint8))
    cv2.imwrite(str(root / depth), (ramp * scale).astype(np.uint16))


def fill(dataset: dict, root: Path, size: tuple[int, int], scale: int) -> None:
    """Write one image where a data set looks for it."""
    prefix = dataset.get("data_prefix") or {"img_path": "", "depth_map_path": ""}
    names = [f"{prefix['img_path']}/a.png", f"{prefix['depth_map_path']}/a_.png"]
    if "ann_file" in dataset:
        (root / dataset.ann_file).write_text("a.png a_.png 500\n")
    else:
        names[1] = f"{prefix['depth_map_path']}/a.png"
    write_pair(root, *(name.lstrip("/") for name in names), size, scale)
    dataset.data_root = str(root)


@pytest.mark.parametrize("name, size, crop, scale", SOURCES, ids=[row[0] for row in SOURCES])
def test_training_sample(name, size, crop, scale, tmp_path):
    cfg = Config.fromfile(CONFIGS / f"{name}.py")
    dataset = cfg.train_dataloader.dataset
    fill(dataset, tmp_path, size, scale)
    with DefaultScope.overwrite_default_scope("mmseg"):
        sample = DATASETS.build(dataset)[0]
        preprocess = MODELS.build(cfg.model.data_preprocessor)
    batch = preprocess({k: [v] for k, v in sample.items()}, training=True)
    assert batch["inputs"].shape == (1, 3, *crop)
    depth = batch["data_samples"][0].gt_depth_map.data
    assert depth.shape == (1, *crop)
    assert depth.dtype == torch.float32
    assert 1 <= depth[depth > 0].min() <= depth.max() <= 6


@pytest.mark.parametrize("name", ["linear_vits16_nyu", "dpt_vit7b16_synthmix"])
def test_test_sample(name, tmp_path):
    cfg = Config.fromfile(CONFIGS / f"{name}.py")
    dataset = cfg.test_dataloader.dataset
    fill(dataset, tmp_path, (480, 640), 1000)
    with DefaultScope.overwrite_default_scope("mmseg"):
        sample = DATASETS.build(dataset)[0]
    resized = "synthmix" in name
    assert sample["inputs"].shape == ((3, 768, 1024) if resized else (3, 480, 640))
    assert sample["data_samples"].gt_depth_map.shape == (480, 640)
    assert sample["data_samples"].ori_shape == (480, 640)


def test_schedule_is_the_recorded_one():
    description, _ = load_golden("heads_schedules")
    kwargs = description["depth_linear"]["kwargs"]
    cfg = Config.fromfile(CONFIGS / "linear_vits16_nyu.py")
    rate, momentum = cfg.param_scheduler
    assert cfg.optim_wrapper.optimizer.lr == kwargs["lr"]
    assert cfg.train_cfg.max_iters == kwargs["total"]
    for scheduler in (rate, momentum):
        # The runner gives the length of the run; the warm-up is a share of it.
        assert "total_iters" not in scheduler and not scheduler.by_epoch
        assert round(scheduler.warmup_iters * kwargs["total"]) == kwargs["warmup_iters"]
    assert rate.final_div_factor == kwargs["final_div_factor"]
    assert momentum.base_momentum == kwargs["base_momentum"]
    assert momentum.max_momentum == kwargs["max_momentum"]


def test_released_models_have_their_own_layers_and_statistics():
    canopy = Config.fromfile(CONFIGS / "chmv2_vitl16sat.py").model
    assert canopy.backbone.out_indices == [5, 11, 17, 23]
    assert canopy.data_preprocessor.mean[0] == pytest.approx(255 * 0.420)
    other = Config.fromfile(CONFIGS / "dpt_vitl16_nyu.py").model
    assert other.backbone.out_indices == [4, 11, 17, 23]
    synthmix = Config.fromfile(CONFIGS / "dpt_vit7b16_synthmix.py").model
    assert synthmix.backbone.out_indices == [9, 19, 29, 39]
