"""The hosts' own train.py, test.py and inference functions with our configs and checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from dinov3_mm.checkpoints import export_backbone
from tests.checkpoints.toys import quickstart_backbone
from tests.hosts.lane import require_hosts

require_hosts()

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs/quickstart"
# Host and metric of each job; depth runs in mmseg.
JOBS = {
    "classification": ("mmpretrain", "accuracy/top1"),
    "segmentation": ("mmseg", "mIoU"),
    "mask2former": ("mmseg", "mIoU"),
    "detection": ("mmdet", "coco/bbox_mAP"),
    "depth": ("mmseg", "depth/rmse"),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "toy.safetensors"
    return export_backbone(quickstart_backbone(), path)


def short(job: str, weights: Path, folder: Path) -> Path:
    """The quickstart of a job with a few samples and two steps, as a file of its own."""
    cfg = Config.fromfile(CONFIGS / f"{job}.py")
    for part in (cfg.model.backbone, cfg.model.backbone.get("backbone", {})):
        if part.get("init_cfg"):
            part.init_cfg.checkpoint = str(weights)
    for loader, length in (("train_dataloader", 4), ("val_dataloader", 2), ("test_dataloader", 2)):
        cfg[loader].batch_size = 2
        cfg[loader].dataset.length = length
    by_epoch = job == "classification"
    cfg.train_cfg = (
        dict(by_epoch=True, max_epochs=1, val_interval=1)
        if by_epoch
        else dict(type="IterBasedTrainLoop", max_iters=2, val_interval=2)
    )
    cfg.param_scheduler = []
    cfg.default_hooks.checkpoint = dict(type="CheckpointHook", interval=1, by_epoch=by_epoch)
    path = folder / f"{job}.py"
    cfg.dump(path)
    return path


def run(host: str, tool: str, *arguments: object) -> None:
    """Run a tool of a host in an environment that knows nothing of this checkout's folder."""
    package = subprocess.run(
        [sys.executable, "-c", f"import importlib.util as u; print(u.find_spec('{host}').origin)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    script = Path(package).parent / ".mim/tools" / tool
    # mmdet's test.py imports its models before it reads the config, where transformers 5 fails.
    prepared = ["-m", "dinov3_mm.hosts"] if (host, tool) == ("mmdet", "test.py") else []
    done = subprocess.run(
        [sys.executable, *prepared, str(script), *map(str, arguments)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_train_test_and_predict(job, weights, tmp_path):
    host, metric = JOBS[job]
    config = short(job, weights, tmp_path)
    run(host, "train.py", config, "--work-dir", tmp_path / "train")
    (checkpoint,) = (
        (tmp_path / "train").glob("*_[12].pth")
        if job == "classification"
        else [tmp_path / "train/iter_2.pth"]
    )
    run(host, "test.py", config, checkpoint, "--work-dir", tmp_path / "test")
    (scalars,) = (tmp_path / "test").glob("*/*.json")
    assert np.isfinite(json.loads(scalars.read_text().splitlines()[-1])[metric])
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "image.png"), image)
    predict(host, job, config, checkpoint, tmp_path / "image.png", weights)


def predict(
    host: str, job: str, config: Path, checkpoint: Path, image: Path, weights: Path
) -> None:
    """A host's inference on a file, with the frozen backbone that the checkpoint leaves out."""
    if host == "mmpretrain":
        from mmpretrain import ImageClassificationInferencer

        inferencer = ImageClassificationInferencer(str(config), str(checkpoint), device="cpu")
        model = inferencer.model
        assert inferencer(str(image))[0]["pred_scores"].shape == (12,)
    elif host == "mmdet":
        from mmdet.apis import inference_detector, init_detector

        model = init_detector(str(config), str(checkpoint), device="cpu")
        boxes = inference_detector(model, str(image)).pred_instances.bboxes
        assert boxes.shape[1] == 4
    else:
        from mmseg.apis import inference_model, init_model

        model = init_model(str(config), str(checkpoint), device="cpu")
        sample = inference_model(model, str(image))
        found = sample.pred_depth_map if job == "depth" else sample.pred_sem_seg
        assert found.data.shape == (1, 96, 96)
    backbone = model.backbone.backbone if job == "mask2former" else model.backbone
    x = torch.randn(1, 3, 32, 32)
    expected = quickstart_backbone().forward_tokens(x)
    assert torch.equal(backbone.forward_tokens(x).patches, expected.patches)
