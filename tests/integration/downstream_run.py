"""A downstream run that takes a second: a linear model on MMEngine's plain Runner, no hosts."""

import itertools
import json
from pathlib import Path
from unittest.mock import patch

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from torch import nn

from dinov3_mm.checkpoints.run_checkpoint import read_run_checkpoint
from tools.train import main

_RUNS = itertools.count()


@DATASETS.register_module()
class ToyPoints(BaseDataset):
    """Points with a label, by name; no file is read."""

    def __init__(self, length: int = 16, reverse: bool = False, **kwargs) -> None:
        self.length, self.reverse = length, reverse
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        names = [{"img_path": f"{i:03d}.png", "gt_label": i % 2} for i in range(self.length)]
        return names[::-1] if self.reverse else names

    def prepare_data(self, index: int) -> dict:
        label = self.get_data_info(index)["gt_label"]
        generator = torch.Generator().manual_seed(index)
        return {"inputs": torch.randn(4, generator=generator) + label, "labels": label}


@MODELS.register_module()
class ToyClassifier(BaseModel):
    """A linear model; ``loss_weight`` scales its loss."""

    def __init__(self, num_classes: int = 2, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(4, num_classes)
        self.loss_weight = loss_weight

    def forward(self, inputs, labels, mode: str = "tensor"):
        scores = self.linear(torch.stack(list(inputs)))
        target = torch.as_tensor(labels)
        return {"loss": self.loss_weight * nn.functional.cross_entropy(scores, target)}


def downstream_config(work_dir: Path, *, by_epoch: bool = False, **changes: object) -> Config:
    """Config of the run; ``changes`` are dotted paths with ``__`` for the dot.

    By iterations: a warm-up of two steps, then a cosine to the end of eight. By epochs: four of
    eight steps each, the cosine laid out over their steps.
    """
    cosine = {"type": "CosineAnnealingLR", "eta_min": 0.0}
    warmup = {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "end": 2}
    if by_epoch:
        train_cfg = {"by_epoch": True, "max_epochs": 4}
        schedule = [{**cosine, "by_epoch": True, "convert_to_iter_based": True}]
    else:
        train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 8}
        schedule = [warmup, {**cosine, "by_epoch": False, "begin": 2}]
    cfg = Config(
        {
            "work_dir": str(work_dir),
            "model": {"type": "ToyClassifier"},
            "train_dataloader": {
                "batch_size": 2,
                "num_workers": 0,
                "sampler": {
                    "type": "DefaultSampler" if by_epoch else "InfiniteSampler",
                    "shuffle": True,
                },
                "dataset": {"type": "ToyPoints"},
                "collate_fn": {"type": "pseudo_collate"},
            },
            "train_cfg": train_cfg,
            "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 0.1}},
            "param_scheduler": schedule,
            "default_hooks": {
                "checkpoint": {
                    "type": "CheckpointHook",
                    "interval": 1 if by_epoch else 2,
                    "by_epoch": by_epoch,
                },
                "logger": {"type": "LoggerHook", "interval": 1},
            },
            "log_processor": {"by_epoch": by_epoch, "window_size": 1},
            "randomness": {"seed": 0},
        }
    )
    cfg.merge_from_dict({key.replace("__", "."): value for key, value in changes.items()})
    return cfg


def train(cfg: Config, folder: Path, *arguments: str) -> int:
    """Run ``tools/train.py`` in this process on a config file of ``cfg``; its exit status."""
    cfg.experiment_name = f"points{next(_RUNS)}"
    path = folder / "points.py"
    with patch("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, True)):
        cfg.dump(path)
        return main([str(path), *arguments])


def state_of(path: Path) -> dict:
    """Content of a checkpoint of the run."""
    return read_run_checkpoint(path)


def log_of(work_dir: Path) -> str:
    """Everything that the runs of a work folder logged."""
    return "\n".join(path.read_text() for path in sorted(Path(work_dir).glob("*/*.log")))


def rates_of(work_dir: Path) -> dict[int, float]:
    """The learning rate of each iteration, from the last run of a work folder that did it."""
    rates = {}
    for path in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            rates[record["step"]] = record["lr"]
    return rates
