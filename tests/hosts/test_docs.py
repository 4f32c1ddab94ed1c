"""The configs of docs/hosts.md train and evaluate as they stand, with a toy for the backbone."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints.toys import toy_backbone
from tests.hosts.lane import require_hosts

require_hosts()
from dinov3_mm.checkpoints import build_backbone, export_backbone  # noqa: E402

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
CONFIGS = dict(re.findall(r"`(\w+\.py)`[^`]*?\n\n```python\n(.*?)```", PAGE, re.S))
ARCH = "dict(embed_dims=32, num_layers=2, num_heads=2, ffn_ratio=2.0, num_registers=2)"
TOY = {
    'arch="small"': f"arch={ARCH}",
    "frozen_stages=12": "frozen_stages=2",
    "=384": "=32",
    "[256, 256, 256, 256]": "[16, 16, 16, 16]",
    "dinov3_vits16_pretrain_lvd1689m-08c60483.pth": "toy.safetensors",
}
SMALL = {
    "classification": ["train_cfg.max_epochs=1", "train_dataloader.batch_size=2"],
    "segmentation": [
        "train_cfg.max_iters=1",
        "train_cfg.val_interval=1",
        "train_dataloader.batch_size=2",
    ],
    "detection": [
        "train_cfg.max_epochs=1",
        "model.test_cfg.rcnn.score_thr=0.0",
        "train_dataloader.dataset.pipeline.2.scale=(128,96)",
        "val_dataloader.dataset.pipeline.1.scale=(128,96)",
    ],
}
HOST = {"classification": "mmpretrain", "segmentation": "mmseg", "detection": "mmdet"}
METRIC = {
    "classification": r"accuracy/top1: \d",
    "segmentation": r"mIoU: +\d",
    "detection": r"coco/segm_mAP: -?\d",
}


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The page's configs, toy weights, and toy data where the configs look for it."""
    folder = tmp_path_factory.mktemp("docs")
    for name, text in CONFIGS.items():
        for long, short in TOY.items():
            text = text.replace(long, short)
        if name.startswith("segmentation"):
            text = text.replace("channels=256", "channels=16")
        (folder / name).write_text(text)
    export_backbone(toy_backbone(patch_size=16), folder / "toy.safetensors")
    rng = np.random.default_rng(0)
    data, ade = folder / "data", folder / "data/ade/ADEChallengeData2016"
    for split, ade_split in (("train", "training"), ("val", "validation")):
        for label in ("cat", "dog"):
            save(data / f"pets/{split}/{label}/0.png", rng.integers(0, 256, (64, 80, 3)))
        save(ade / f"images/{ade_split}/0.jpg", rng.integers(0, 256, (512, 512, 3)))
        classes = np.kron(rng.integers(0, 151, (8, 8)), np.ones((64, 64)))
        save(ade / f"annotations/{ade_split}/0.png", classes)
        save(data / f"coco/{split}2017/0.jpg", rng.integers(0, 256, (96, 128, 3)))
        write_coco(data / f"coco/annotations/instances_{split}2017.json")
    return folder


def write_coco(path: Path) -> None:
    from mmdet.datasets import CocoDataset

    names = CocoDataset.METAINFO["classes"]
    content = {
        "images": [{"id": 0, "file_name": "0.jpg", "width": 128, "height": 96}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {
                "id": 1,
                "image_id": 0,
                "category_id": 7,
                "bbox": [10, 20, 60, 50],
                "area": 3000,
                "iscrowd": 0,
                "segmentation": [[10, 20, 70, 20, 70, 70, 10, 70]],
            }
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def train(folder: Path, name: str, tool: Path) -> str:
    """Run a training tool on one of the configs, in this process's environment, on few images."""
    job = name.partition("_")[0]
    options = list(SMALL[job])
    # mmdet's base config has a third loader.
    for phase in ("train", "val", *(["test"] if job == "detection" else [])):
        options += [f"{phase}_dataloader.num_workers=0"]
        options += [f"{phase}_dataloader.persistent_workers=False"]
    command = [sys.executable, tool, name, "--cfg-options", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def test_the_page_holds_the_configs():
    assert sorted(CONFIGS) == [
        "classification_linear.py",
        "classification_lora.py",
        "detection_mask_rcnn.py",
        "segmentation_linear.py",
        "segmentation_upernet.py",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["classification_linear.py", "segmentation_linear.py", "detection_mask_rcnn.py"]
)
def test_with_the_tool_of_the_host(name, folder):
    job = name.partition("_")[0]
    host = Path(find_spec(HOST[job]).origin).parent
    output = train(folder, name, host / ".mim" / "tools" / "train.py")
    assert re.search(METRIC[job], output), output[-2000:]
    assert "loaded 38/38 backbone tensors" in output


@pytest.mark.slow
def test_with_our_tool(folder):
    output = train(folder, "segmentation_upernet.py", ROOT / "tools" / "train.py")
    assert re.search(METRIC["segmentation"], output), output[-2000:]


@pytest.mark.slow
def test_adapters_are_trained_and_exported(folder):
    output = train(folder, "classification_lora.py", ROOT / "tools" / "train.py")
    assert re.search(METRIC["classification"], output), output[-2000:]
    (code,) = re.findall(r"```py\n(.*?)```", PAGE, re.S)
    code = code.replace("epoch_10", "epoch_1")
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    assert build_backbone(folder / "finetuned.safetensors").embed_dims == 32
