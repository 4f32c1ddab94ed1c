"""Hooks that kill or hold their own process in the worst moment, and one that records samples."""

import io
import json
import os
import signal
import time
from pathlib import Path

import safetensors.torch
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from dinov3_mm.checkpoints import export
from dinov3_mm.engine import training_state as sharded_state


@HOOKS.register_module()
class KillWhileSavingHook(Hook):
    """SIGKILL when half of the bytes of the checkpoint of ``iteration`` are on disk.

    The run that resumes passes that checkpoint alive: the hook fires once per work folder.
    """

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Replace the writer of this one file."""
        flag = Path(runner.work_dir) / f"killed_while_saving_{self.iteration}"
        if runner.iter + 1 == self.iteration and not flag.exists():
            flag.touch()
            torch.save = _write_half_and_die(torch.save)


@HOOKS.register_module()
class HoldHook(Hook):
    """Holds the run after ``iteration`` until SIGUSR1 or SIGKILL comes, once per work folder.

    ``held_<iteration>`` appears in the work folder as soon as the signal may come. So the test need
    not be faster than the run.
    """

    priority = "LOWEST"

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Wait for the signal and hand it on to who listened before."""
        flag = Path(runner.work_dir) / f"held_{self.iteration}"
        if runner.iter + 1 != self.iteration or flag.exists():
            return
        signals = []
        listener = signal.signal(signal.SIGUSR1, lambda *args: signals.append(args))
        flag.touch()
        while not signals:
            time.sleep(0.01)
        signal.signal(signal.SIGUSR1, listener)
        listener(*signals[0])


def _write_half_and_die(save):
    def write(state: dict, path: Path) -> None:
        buffer = io.BytesIO()
        save(state, buffer)
        content = buffer.getvalue()
        Path(path).write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    return write


@HOOKS.register_module()
class KillShardedSaveHook(Hook):
    """SIGKILL of one rank inside a sharded checkpoint, or of the first inside the export.

    Args:
        iteration: of the checkpoint.
        where: ``'shards'``: the other ranks are writing theirs; ``'export'``: half of the file is
            on disk.
    """

    def __init__(self, iteration: int, where: str) -> None:
        self.iteration = iteration
        self.where = where

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Replace the writer of this one checkpoint or export."""
        flag = Path(runner.work_dir) / f"killed_{self.where}_{self.iteration}_{runner.rank}"
        if runner.iter + 1 != self.iteration or flag.exists():
            return
        flag.touch()
        if self.where == "shards" and runner.rank == runner.world_size - 1:
            sharded_state.dcp.save = _die
        if self.where == "export" and runner.rank == 0:
            export.save_file = _write_half_of_a_safetensors_and_die


def _write_half_of_a_safetensors_and_die(tensors: dict, path: Path, **_) -> None:
    content = safetensors.torch.save(tensors)
    Path(path).write_bytes(content[: len(content) // 2])
    _die()


def _die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class RecordPositionsHook(Hook):
    """Writes which samples each rank saw in each iteration: ``positions_<rank>.jsonl``."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Append one line."""
        record = {"iteration": runner.iter, "positions": data_batch["positions"].tolist()}
        with open(Path(runner.work_dir) / f"positions_{runner.rank}.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
