"""Every shipped config with a frozen backbone is accepted, and labels fit the cached views."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, DefaultScope

from dinov3_mm.engine.config import ConfigError
from dinov3_mm.engine.feature_cache.views import (
    SIZE,
    drawn_from,
    for_features,
    for_labels,
    frozen_part,
    plain,
    stamp,
    training_views,
    validation_views,
)
from tests.downstream.steps import CONFIGS
from tests.hosts.lane import require_hosts
from tests.shrink import every, shrink

require_hosts()

JOBS = ("classification", "segmentation", "detection", "depth")
SIDES = (120, 180)
# Frozen configs that are shipped: at least so many.
LEAST = {"classification": 22, "segmentation": 50, "detection": 35, "depth": 30}


def is_frozen(cfg: Config) -> bool:
    kinds = ("DINOv3ViT", "DINOv3ConvNeXt")
    return any(part.get("frozen_stages", -1) > 0 for k in kinds for part in every(cfg.model, k))


@cache
def frozen_configs(job: str) -> list[tuple[Path, Config]]:
    found = [(path, Config.fromfile(path)) for path in sorted((CONFIGS / job).glob("*.py"))]
    return [(path, cfg) for path, cfg in found if is_frozen(cfg)]


def smaller(value):
    """The same steps on images of an eighth of the size."""
    if isinstance(value, dict):
        return {name: smaller(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(smaller(item) for item in value)
    return value // 8 if type(value) is int and value > 99 else value


def run(steps: list[dict], record: dict, view: int, salt: int = 0):
    with drawn_from("image", view, salt):
        packed = Compose(steps)({**record})
        return packed, stamp()


def with_labels(job: str, image: np.ndarray) -> dict:
    """A record whose labels are read off its image, so that they must stay in place with it."""
    labels = image[..., 0]
    if job == "classification":
        return {"gt_label": np.array(1)}
    if job == "segmentation":
        return {"gt_seg_map": labels, "seg_fields": ["gt_seg_map"], "reduce_zero_label": False}
    if job == "depth":
        return {"gt_depth_map": labels.astype(np.float32), "seg_fields": ["gt_depth_map"]}
    box = [30.0, 20.0, 120.0, 90.0]
    polygon = [30.0, 20.0, 120.0, 20.0, 120.0, 90.0, 30.0, 90.0]
    instance = {"bbox": box, "bbox_label": 1, "ignore_flag": 0, "mask": [polygon]}
    return {"instances": [instance], "height": SIDES[0], "width": SIDES[1], "img_id": 1}


@pytest.mark.parametrize("job", JOBS)
def test_every_frozen_config_is_accepted(job):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 200, (*SIDES, 3), dtype=np.uint8)
    record = {"img_path": "image.png", "img_shape": SIDES, "ori_shape": SIDES}
    seen = set()
    configs = frozen_configs(job)
    assert len(configs) >= LEAST[job]
    for path, cfg in configs:
        cfg = shrink(cfg, job)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            frozen_part(MODELS.build(cfg.model.backbone))
            views = training_views(cfg)
            key = json.dumps([plain(views.first), plain(views.further)])
            if key in seen:
                continue
            seen.add(key)
            validation_views(cfg.val_dataloader)
            assert views.further, f"{path} draws nothing"
            assert views.notes, path
            check_views(path, job, views, record, image)


def check_views(path, job, views, record, image):
    labels = with_labels(job, image)
    load = [s for s in views.first if s["type"].startswith("Load") and "Image" in s["type"]]
    to_float = any(step.get("to_float32") for step in load)
    given = {**record, "img": image.astype(np.float32) if to_float else image}
    outputs = {}
    for view in range(4):
        steps = smaller(views.steps(view))
        features, drawn = run(for_features(steps), given, view)
        again, _ = run(for_features(steps), given, view, salt=0 if view else 1)
        outputs[view] = features["inputs"]
        assert torch.equal(features["inputs"], again["inputs"]), path
        empty = for_labels(steps, with_image=False, on_pixels=job != "classification")
        packed, redrawn = run(empty, {**record, **labels, SIZE: (*SIDES, 1)}, view)
        whole, _ = run(steps, {**given, **labels}, view)
        if job == "classification":
            assert packed["data_samples"].gt_label.item() == 1
            continue
        assert redrawn == drawn, path
        assert packed["inputs"].shape == features["inputs"].shape, path
        here, there = packed["data_samples"], whole["data_samples"]
        assert here.keys() == there.keys(), path
        if job == "detection":
            boxes = [s.gt_instances.bboxes.tensor for s in (here, there)]
            assert torch.equal(*boxes), path
        else:
            name = "gt_sem_seg" if job == "segmentation" else "gt_depth_map"
            maps = [s.get(name).data for s in (here, there)]
            assert torch.equal(*maps), path
            assert maps[0].shape[-2:] == packed["inputs"].shape[-2:], path
    others = [outputs[view] for view in (1, 2, 3)]
    first = outputs[0]
    assert any(o.shape != first.shape or not torch.equal(o, first) for o in others), path


def test_draws_do_not_look_at_labels():
    cfg = Config.fromfile(CONFIGS / "segmentation/linear_vits16_ade20k.py")
    crops = [s for s in training_views(cfg).further if s["type"] == "RandomCrop"]
    assert [crop["cat_max_ratio"] for crop in crops] == [1.0]


def test_what_was_replaced_is_said():
    cfg = Config.fromfile(CONFIGS / "segmentation/linear_vits16_ade20k.py")
    assert training_views(cfg).notes == [
        "replaced RandomResize by Resize, RandomCrop by MiddleCrop, as in validation",
        "left out RandomFlip, DINOv3PhotoMetricDistortion",
    ]


def test_mixed_images_are_refused():
    cfg = Config.fromfile(CONFIGS / "detection/mask-rcnn_vits16_coco.py")
    cfg.train_dataloader.dataset.pipeline.insert(2, dict(type="Mosaic"))
    with pytest.raises(ConfigError, match=r"mix images \(Mosaic\)"):
        training_views(cfg)


def test_other_draws_are_left_alone():
    np.random.seed(1)
    expected = np.random.rand(3)
    np.random.seed(1)
    first = np.random.rand(1)
    with drawn_from("a", 1):
        inside = np.random.rand(2)
    assert np.array_equal(np.concatenate([first, np.random.rand(2)]), expected)
    with drawn_from("a", 1):
        assert np.array_equal(np.random.rand(2), inside)
