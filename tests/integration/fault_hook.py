"""Hooks that spoil what a run sees, or stop it where a kill is to find it."""

import time
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class PoisonHook(Hook):
    """Puts an infinite pixel into the local crops of one rank.

    Only the student sees local crops: the targets, which all ranks settle together, stay finite.
    """

    priority = "VERY_HIGH"

    def __init__(self, iteration: int, rank: int = 0):
        self.iteration = iteration
        self.rank = rank

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration and runner.rank == self.rank:
            crops = data_batch["local_crops"].float()
            crops[0, 0, 0, 0] = float("inf")
            data_batch["local_crops"] = crops


@HOOKS.register_module()
class WaitHook(Hook):
    """Stands still after ``iteration`` steps until somebody kills the process, two minutes at most.

    ``waiting_<rank>`` in the work folder says that it does.
    """

    priority = "LOWEST"

    def __init__(self, iteration: int):
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iteration:
            (Path(runner.work_dir) / f"waiting_{runner.rank}").touch()
            time.sleep(120)
