"""What a person sees of a running training: a live bar on a terminal, lines elsewhere."""

import atexit
import logging
import sys
import time
from datetime import timedelta

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

_STREAM = logging.StreamHandler


class ProgressBar:
    """A rich bar at the bottom of the terminal; log lines scroll above it.

    Args:
        logger (logging.Logger): Its console handler writes through the bar while it lives, and
            skips records that carry ``on_bar``: the bar shows them.
        total (int): Steps of the run.
        done (int): Steps done before.
    """

    def __init__(self, logger: logging.Logger, *, total: int, done: int) -> None:
        self._progress = Progress(
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[status]}"),
            console=Console(),
        )
        self._task = self._progress.add_task("train", total=total, completed=done, status="")
        self._handlers = [
            handler
            for handler in logger.handlers
            if type(handler) is _STREAM and handler.stream is sys.stdout
        ]
        self._progress.start()
        atexit.register(self.close)  # a run that dies of an error gives the terminal back as well
        for handler in self._handlers:
            handler.setStream(sys.stdout)
            handler.addFilter(_is_not_on_bar)

    def advance(self) -> None:
        """One more step is done."""
        self._progress.advance(self._task)

    def show(self, status: str) -> None:
        """Replace the text beside the bar."""
        self._progress.update(self._task, status=status)

    def close(self) -> None:
        """Give the terminal back."""
        atexit.unregister(self.close)
        self._progress.stop()
        for handler in self._handlers:
            handler.setStream(sys.stdout)
            handler.removeFilter(_is_not_on_bar)


class RunClock:
    """Wall time of a run, evaluation and checkpoints included, for its ETA."""

    def __init__(self, *, done: int, total: int) -> None:
        self._began = time.perf_counter()
        self._first, self._total = done, total

    def eta(self, done: int) -> timedelta:
        """Expected time to the end after ``done`` steps."""
        per_step = (time.perf_counter() - self._began) / max(1, done - self._first)
        return timedelta(seconds=round(per_step * (self._total - done)))


def memory_text() -> str:
    """Peak CUDA memory, or the resident memory of this process and its loader workers."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB CUDA"
    return f"{resident_bytes() / 2**30:.2f} GiB"


def resident_bytes() -> int:
    """Resident memory of this process and its children; pages that they share count repeatedly."""
    process = psutil.Process()
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _is_not_on_bar(record: logging.LogRecord) -> bool:
    return not hasattr(record, "on_bar")
