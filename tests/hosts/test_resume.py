"""Work folders of all downstream jobs, copied and moved, go on from their own checkpoints."""

import itertools
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from mmengine.config import Config

from dinov3_mm.checkpoints import export_backbone
from dinov3_mm.checkpoints.run_checkpoint import read_run_checkpoint
from tests.checkpoints.toys import quickstart_backbone
from tests.hosts.lane import require_hosts
from tests.integration.downstream_run import log_of
from tools.train import main

require_hosts()

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart"
_RUNS = itertools.count()
JOBS = ("classification", "segmentation", "mask2former", "detection", "depth")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "toy.safetensors"
    return export_backbone(quickstart_backbone(), path)


def tiny(job: str, weights: Path) -> Config:
    """The quickstart of a job with four samples: two epochs, or four iterations."""
    cfg = Config.fromfile(QUICKSTART / f"{job}.py")
    for part in (cfg.model.backbone, cfg.model.backbone.get("backbone", {})):
        if part.get("init_cfg"):
            part.init_cfg.checkpoint = str(weights)
    cfg.train_dataloader.batch_size = 2
    cfg.train_dataloader.dataset.length = 4
    for key in [key for key in cfg if key.startswith(("val_", "test_"))]:
        cfg[key] = None
    # A named visualizer would be that of the first run in this process.
    cfg.visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
    by_epoch = job == "classification"
    cfg.train_cfg = (
        dict(by_epoch=True, max_epochs=2)
        if by_epoch
        else dict(type="IterBasedTrainLoop", max_iters=4)
    )
    checkpoint = dict(type="CheckpointHook", interval=1 if by_epoch else 2, by_epoch=by_epoch)
    cfg.default_hooks.checkpoint = dict(checkpoint, max_keep_ckpts=1)
    return cfg


def train(config: Path, work_dir: Path, *words: str) -> None:
    """``tools/train.py``; a word with '=' is an option of the config."""
    # MMEngine names loggers by experiment and second.
    options = [f"experiment_name=run{next(_RUNS)}", *(word for word in words if "=" in word)]
    words = [word for word in words if "=" not in word]
    main([str(config), "--work-dir", str(work_dir), *words, "--cfg-options", *options])


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_copied_and_moved_folders(job, weights, tmp_path):
    config, run = tmp_path / f"{job}.py", tmp_path / "run"
    with patch("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, True)):
        tiny(job, weights).dump(config)
        length = "train_cfg.max_epochs" if job == "classification" else "train_cfg.max_iters"
        half, end = ("1", "epoch_2.pth") if job == "classification" else ("2", "iter_4.pth")
        train(config, run, f"{length}={half}")
        shutil.copytree(run, tmp_path / "copy")
        train(config, run, "--resume")
        shutil.copytree(tmp_path / "copy", tmp_path / "moved")
        for folder in ("copy", "moved"):
            if folder == "moved":
                shutil.rmtree(run)  # what ``last_checkpoint`` names is gone
            train(config, tmp_path / folder, "--resume")
    for folder in ("copy", "moved"):
        log = log_of(tmp_path / folder)
        assert f"Load checkpoint from {tmp_path / folder}/" in log
        assert f"Load checkpoint from {run}/" not in log
        assert f"resume: {half} of" in log
    states = [read_run_checkpoint(tmp_path / folder / end) for folder in ("copy", "moved")]
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][name]), name
