"""The learning rate of a downstream config over its run, with MMEngine's own schedulers."""

from functools import cache

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

# Iterations of an epoch: enough for every warm-up to end within half a run.
EPOCH = 300


def length_of(cfg: Config) -> tuple[str, int]:
    """Key and value of the run's length."""
    key = "max_epochs" if "max_epochs" in cfg.train_cfg else "max_iters"
    return key, cfg.train_cfg[key]


def build_schedulers(cfg: Config) -> tuple[list, torch.optim.Optimizer, int]:
    """Schedulers as the runner of a config builds them, their optimizer, iterations of the run."""
    key, length = length_of(cfg)
    runner = object.__new__(Runner)
    loop = object.__new__(EpochBasedTrainLoop if key == "max_epochs" else IterBasedTrainLoop)
    loop._max_epochs, loop._max_iters = (
        (length, length * EPOCH) if key == "max_epochs" else (1, length)
    )
    runner._train_loop = loop
    runner._train_dataloader = range(EPOCH)
    loop.dataloader = range(EPOCH)
    runner.logger = MMLogger.get_instance("schedules", log_level="ERROR")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    runner.optim_wrapper = OptimWrapper(optimizer)
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
        schedulers = runner.build_param_scheduler(cfg.param_scheduler)
    return schedulers, optimizer, loop._max_iters


def rates(cfg: Config) -> list[float]:
    """Learning rate of each iteration, as a share of the base rate."""
    schedulers, optimizer, total = build_schedulers(cfg)
    return _course(schedulers, optimizer, total)


def _course(schedulers: list, optimizer: torch.optim.Optimizer, total: int) -> list[float]:
    course = []
    for iteration in range(1, total + 1):
        course.append(optimizer.param_groups[0]["lr"])
        for scheduler in schedulers:
            if not scheduler.by_epoch or iteration % EPOCH == 0:
                scheduler.step()
    return course


def key_of(cfg: Config) -> str:
    """Configs with the same schedule and the same length have the same key."""
    return repr((cfg.param_scheduler, dict(cfg.train_cfg)))


@cache
def downstream_configs() -> dict[str, Config]:
    """One config for each schedule and length that a shipped downstream config has."""
    from tests.downstream.steps import CONFIGS

    found: dict[str, Config] = {}
    jobs = ("classification", "segmentation", "detection", "depth")
    paths = [path for job in jobs for path in sorted((CONFIGS / job).glob("*.py"))]
    for path in [*paths, *(CONFIGS / "quickstart").glob("*.py")]:
        cfg = Config.fromfile(path)
        if cfg.get("param_scheduler") and cfg.get("train_cfg"):
            found.setdefault(key_of(cfg), cfg)
    return found
