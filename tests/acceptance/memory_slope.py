"""Resident memory of a run over 1500 iterations: the slope after the start must be flat.

    python -m tests.acceptance.memory_slope [--iters 1500] [--workers 2] [--bar 0.02]

Memory is read for the training process and each loader worker (the reference release leaks about
3.4 MB per iteration with four workers). The least-squares slope is taken from iteration 200 on.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import psutil
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from tests.integration.toy_run import toy_config, train, write_images

SETTLED = 200
STRIDE = 10


@HOOKS.register_module()
class MemoryTraceHook(Hook):
    """Notes the resident memory of every process each ten iterations."""

    records: list[tuple[int, dict[str, int]]]

    def __init__(self) -> None:
        type(self).records = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Read main process and workers."""
        if runner.iter % STRIDE == 0:
            process = psutil.Process()
            workers = sorted(process.children(), key=lambda child: child.pid)
            memory = {"main": process.memory_info().rss}
            memory |= {f"worker {n}": child.memory_info().rss for n, child in enumerate(workers)}
            self.records.append((runner.iter, memory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iters", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--bar", type=float, default=0.02, help="MB per iteration, all processes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cfg = toy_config(write_images(folder / "images"), folder / "run")
        cfg.train_cfg.max_iters = arguments.iters
        cfg.train_dataloader.num_workers = arguments.workers
        cfg.default_hooks.logger.interval = 100
        cfg.default_hooks.checkpoint.interval = arguments.iters
        cfg.custom_hooks.append(dict(type="MemoryTraceHook"))
        train(cfg, folder)
    raise SystemExit(not report(MemoryTraceHook.records, arguments.bar))


def report(records: list[tuple[int, dict[str, int]]], bar: float) -> bool:
    """Print first and last memory and the slope of each process; whether their sum is flat."""
    settled = [(step, memory) for step, memory in records if step >= SETTLED]
    steps = np.array([step for step, _ in settled])
    total = 0.0
    for name in settled[0][1]:
        sizes = np.array([memory[name] for _, memory in settled]) / 1e6
        slope = float(np.polyfit(steps, sizes, 1)[0])
        total += slope
        print(f"{name}: {sizes[0]:.1f} MB -> {sizes[-1]:.1f} MB, slope {slope:+.5f} MB/iteration")
    print(f"all processes: {total:+.5f} MB/iteration, bar {bar}")
    return total < bar


if __name__ == "__main__":
    main()
