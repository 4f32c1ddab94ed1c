"""Runs of the hosts on files as users have them: turned, hidden, linked, damaged."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner
from PIL import Image

from dinov3_mm.checkpoints import export_backbone
from tests.acceptance.image_kinds import encoded, exif
from tests.checkpoints.toys import quickstart_backbone
from tests.hosts.lane import require_hosts

require_hosts()
import dinov3_mm.datasets.segmentation  # noqa: E402, F401

CONFIGS = Path(__file__).parents[2] / "configs/quickstart"
HEIGHT, WIDTH = 96, 128
NUM_IMAGES = 4
TURNED, DAMAGED = 1, 2
JOBS = ("classification", "segmentation", "depth", "detection")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "toy.safetensors"
    return export_backbone(quickstart_backbone(), path)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_split(folder: Path, split: str, damaged: bool) -> None:
    """Photos with the truths of all jobs: one turned, one damaged, litter beside them."""
    rng = np.random.default_rng(0)
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    for number in range(NUM_IMAGES):
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        turned = number == TURNED
        data = encoded(pixels, "JPEG", exif=exif(6 if turned else 1))
        if damaged and number == DAMAGED:
            data = data[: len(data) // 2]
        image = write(folder / "images" / split / f"{number}.JPG", data)
        labels = rng.integers(0, 2, (HEIGHT, WIDTH), dtype=np.uint8)
        for kind in ("labels", "depth"):
            write(folder / kind / split / f"{number}.png", encoded(labels + 1, "PNG"))
        by_class = folder / "classes" / split / ("cat", "dog")[number % 2] / image.name
        by_class.parent.mkdir(parents=True, exist_ok=True)
        by_class.symlink_to(image)
        size = (HEIGHT, WIDTH) if turned else (WIDTH, HEIGHT)
        entry = {"id": number, "file_name": image.name, "width": size[0], "height": size[1]}
        coco["images"].append(entry)
        box = {"bbox": [8, 8, 40, 40], "area": 1600, "category_id": 1, "iscrowd": 0}
        coco["annotations"].append({"id": number + 1, "image_id": number, **box})
    write(folder / f"{split}.json", json.dumps(coco).encode())
    write(folder / "images" / split / "._0.JPG", b"x")
    write(folder / "classes" / split / ".ipynb_checkpoints/a.jpg", b"x")
    write(folder / "images" / split / "IMG.HEIC", b"x")


def of_files(job: str, folder: Path, weights: Path) -> Config:
    """The quickstart of a job on files, with the loading steps of the shipped configs."""
    cfg = Config.fromfile(CONFIGS / f"{job}.py")
    cfg.model.backbone.init_cfg.checkpoint = str(weights)
    cfg.work_dir = str(folder / "run")
    for split in ("train", "val"):
        loader = cfg[f"{split}_dataloader"]
        pipeline = loader.dataset.pipeline
        broken = "replace" if split == "train" else "error"
        labels = {"segmentation": "LoadLabelMap", "depth": "LoadDepthMap"}.get(job)
        if labels:
            if split == "train":
                pipeline.insert(-1, dict(type="Resize", scale=(96, 96)))
            pipeline.insert(1 if split == "train" else 2, dict(type=labels, broken=broken))
        if job == "classification":
            pipeline.insert(1, dict(type="Resize", scale=64))
            data = dict(type="ClassificationFolder", data_prefix=f"classes/{split}")
        elif job == "segmentation":
            data = dict(type="SegmentationFolder", split=split)
        elif job == "depth":
            prefix = dict(img_path=f"images/{split}", depth_map_path=f"depth/{split}")
            data = dict(type="DepthFolderDataset", data_prefix=prefix, depth_scale=1.0)
        else:
            pipeline.insert(2, dict(type="Resize", scale=(96, 96), keep_ratio=True))
            data = dict(
                type="CocoDataset",
                ann_file=f"{split}.json",
                data_prefix=dict(img=f"images/{split}/"),
                metainfo=dict(classes=("cat",)),
                test_mode=split == "val",
            )
        loader.dataset = dict(data, data_root=str(folder), pipeline=pipeline)
        loader.batch_size = 2 if split == "train" else 1
    if job == "classification":
        cfg.model.head.num_classes = cfg.model.data_preprocessor.num_classes = 2
        cfg.val_evaluator = dict(type="Accuracy", topk=(1,))
        cfg.train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=2)
    else:
        cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=4, val_interval=4)
    if job == "segmentation":
        cfg.model.decode_head.num_classes = 3
        write(folder / "classes.txt", "surroundings\ncat\ndog\n".encode("utf-16"))
    if job == "detection":
        cfg.model.bbox_head.num_classes = 1
        cfg.val_evaluator = dict(
            type="CocoMetric", metric="bbox", ann_file=str(folder / "val.json")
        )
    cfg.param_scheduler = []
    cfg.test_dataloader, cfg.test_evaluator, cfg.test_cfg = None, None, None
    return cfg


@pytest.fixture
def logged():
    """Errors and notes of whatever logger is the current one."""
    lines = []
    handle = logging.Logger.handle

    def kept(self, record):
        lines.append(record.getMessage())
        handle(self, record)

    logging.Logger.handle = kept
    yield lines
    logging.Logger.handle = handle


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_training_goes_on_and_evaluation_names_the_file(job, weights, tmp_path, logged):
    write_split(tmp_path, "train", damaged=True)
    write_split(tmp_path, "val", damaged=False)
    torch.manual_seed(0)
    runner = Runner.from_cfg(of_files(job, tmp_path, weights))
    runner.train()
    replaced = [line for line in logged if line.startswith("unreadable image replaced")]
    assert len(replaced) == 1 and f"train/{DAMAGED}.JPG: OSError" in replaced[0].replace(
        "train/cat/", "train/"
    )
    if job != "detection":
        assert any("files; left out" in line and "hidden" in line for line in logged)
    image = tmp_path / f"images/val/{DAMAGED}.JPG"
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{DAMAGED}\.JPG: OSError: image file is truncated"):
        runner.val_loop.run()
    MMLogger.get_current_instance().handlers.clear()


@pytest.mark.parametrize("job", JOBS)
def test_the_turned_image_comes_turned(job, weights, tmp_path):
    write_split(tmp_path, "train", damaged=False)
    cfg = of_files(job, tmp_path, weights)
    with Image.open(tmp_path / f"images/train/{TURNED}.JPG") as image:
        assert image.size == (WIDTH, HEIGHT)
    dataset = cfg.train_dataloader.dataset
    dataset.pipeline = [step for step in dataset.pipeline if step["type"].startswith("Load")]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        data = DATASETS.build(dataset)
    shapes = {data[index]["img"].shape[:2] for index in range(NUM_IMAGES)}
    assert shapes == {(HEIGHT, WIDTH), (WIDTH, HEIGHT)}
    for index in range(NUM_IMAGES):
        sample = data[index]
        for name in ("gt_seg_map", "gt_depth_map"):
            assert name not in sample or sample[name].shape == sample["img"].shape[:2]
