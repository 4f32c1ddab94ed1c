"""A hook that kills its own process in the worst moment: half-way through a checkpoint file."""

import io
import os
import signal
from pathlib import Path

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


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


def _write_half_and_die(save):
    def write(state: dict, path: Path) -> None:
        buffer = io.BytesIO()
        save(state, buffer)
        content = buffer.getvalue()
        Path(path).write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    return write
