"""Transforms and metrics of the configs against recorded values of the official evaluation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from PIL import Image

from tests.golden import assert_parity, load_golden
from tests.hosts.lane import require_hosts

require_hosts()
import dinov3_mm.models.segmentation  # noqa: E402, F401, I001 - before mmseg: see hosts.py

import mmseg.datasets  # noqa: E402
import mmseg.evaluation  # noqa: E402
from mmseg.models.data_preprocessor import SegDataPreProcessor  # noqa: E402

CONFIGS = Path(__file__).parents[3] / "configs"
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


@pytest.fixture
def image(tmp_path):
    """A recorded image and label as files."""
    _, tensors = load_golden("heads_seg_transform")
    Image.fromarray(tensors["in.image"].numpy()).save(tmp_path / "image.png")
    Image.fromarray(tensors["in.label"].numpy()).save(tmp_path / "label.png")
    sample = {
        "img_path": str(tmp_path / "image.png"),
        "seg_map_path": str(tmp_path / "label.png"),
        "seg_fields": [],
        "reduce_zero_label": True,
        "label_map": None,
    }
    return sample, tensors


def pipeline(cfg, sides):
    """The test pipeline of a config, at another short side."""
    (resize,) = [step for step in cfg.test_pipeline if step["type"] == "Resize"]
    resize["scale"] = (cfg.long_side, sides)
    with DefaultScope.overwrite_default_scope("mmseg"):
        return Compose(cfg.test_pipeline)


@pytest.mark.parametrize(("side", "expected"), [(24, "out.imgs.0"), (30, "out.imgs.1")])
def test_images_of_the_evaluation(image, side, expected):
    sample, tensors = image
    cfg = Config.fromfile(CONFIGS / "_base_/segmentation/pipelines_512.py")
    packed = pipeline(cfg, side)(sample)
    preprocess = SegDataPreProcessor(mean=MEAN, std=STD, bgr_to_rgb=True)
    batch = {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}
    inputs = preprocess(batch)["inputs"][0]
    print(f"{side}: {assert_parity(inputs, tensors[expected]):.1e}")
    label = packed["data_samples"].gt_sem_seg.data
    reduced = tensors["out.label"].long()
    # What is recorded may keep 0 for unlabelled; the metric of the same protocol reduces it.
    if int(reduced.min()) == 0:
        reduced = torch.where(reduced == 0, 255, reduced - 1)
    assert torch.equal(label.long(), reduced)


def test_crops_are_drawn_again_for_one_class_in_three_quarters():
    """The image is of one class but for a strip: crops without the strip are drawn again."""
    cfg = Config.fromfile(CONFIGS / "_base_/segmentation/pipelines_512.py")
    (crop,) = [step for step in cfg.train_pipeline if step["type"] == "RandomCrop"]
    crop["crop_size"] = (16, 16)
    with DefaultScope.overwrite_default_scope("mmseg"):
        transform = Compose([crop])
    labels = np.zeros((16, 160), np.uint8)
    labels[:, 72:80] = 1
    np.random.seed(0)
    shares = []
    for _ in range(50):
        sample = {"img": np.zeros((16, 160, 3), np.uint8), "gt_seg_map": labels.copy()}
        out = transform({**sample, "seg_fields": ["gt_seg_map"]})["gt_seg_map"]
        shares.append(np.bincount(out.ravel(), minlength=2).max() / out.size)
    # A draw meets the rule with a chance of 15 in 145, one of eleven with 0.7.
    assert 0.5 < np.mean(np.array(shares) < 0.75) < 0.9


def test_metrics():
    description, tensors = load_golden("heads_seg_metrics")
    metric = mmseg.evaluation.IoUMetric(iou_metrics=["mIoU", "mDice", "mFscore"])
    metric.dataset_meta = {"classes": [str(i) for i in range(description["num_classes"])]}
    samples = [
        {
            "pred_sem_seg": {"data": tensors[f"in.pred{i}"][None]},
            "gt_sem_seg": {"data": reduce_zero(tensors[f"in.label{i}"])[None]},
        }
        for i in range(2)
    ]
    metric.process({}, samples)
    results = metric.evaluate(2)
    names = {
        "mIoU": "mIoU",
        "acc": "mAcc",
        "aAcc": "aAcc",
        "dice": "mDice",
        "fscore": "mFscore",
        "precision": "mPrecision",
        "recall": "mRecall",
    }
    for official, ours in names.items():
        expected = tensors[f"out.m.{official}"].item()
        expected *= 100 if expected <= 1 else 1
        assert results[ours] == pytest.approx(expected, abs=0.006), official


def reduce_zero(label):
    """0 becomes 255, n becomes n - 1, and 255 stays, as ``LoadAnnotations`` does."""
    label = label.long()
    return torch.where((label == 0) | (label == 255), 255, label - 1)
