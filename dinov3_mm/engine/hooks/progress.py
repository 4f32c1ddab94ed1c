"""Progress and metrics of a pretraining run."""

import atexit
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from datetime import timedelta

import psutil
import torch
from mmengine.dist import all_gather_object, all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from torch import Tensor

from dinov3_mm.models.pretraining.multi_distillation import PREFIX
from dinov3_mm.models.wrapping import unwrapped

# What a log line and the bar show, if it was measured; everything goes to the writers.
SHOWN = ("loss", "dino_local_loss", "dino_global_loss", "ibot_loss", "koleo_loss", "gram_loss")


@HOOKS.register_module()
class ProgressHook(Hook):
    """Shows progress and hands the metrics to the configured writers once per interval.

    The metrics of a step are the loop's ``outputs``, device tensors that are averaged over the
    interval and over processes and read once. Beside them it writes ``img_per_s`` (images of the
    global batch per second of training), ``data_wait`` (share of that time spent waiting for data,
    0 to 1) and ``broken_images`` once there are any. Writers are those of ``visualizer`` in the
    config (JSON lines, TensorBoard, ...); the last values are in the message hub as
    ``train/<name>``.

    Args:
        interval (int): Steps between two records. The first step is recorded as well.
        bar (bool | None): Show a live bar. Defaults to None: where the output is a terminal.

    Raises:
        ValueError: If ``interval`` is not a positive integer.
    """

    priority = "BELOW_NORMAL"

    def __init__(self, interval: int = 50, bar: bool | None = None) -> None:
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be an integer >= 1, got {interval!r}")
        self.interval = interval
        self._wants_bar = sys.stdout.isatty() if bar is None else bar
        self._bar: ProgressBar | None = None
        self._window = MetricWindow()

    def before_train(self, runner) -> None:
        """Tell those who have no runner how long the run is."""
        model = unwrapped(runner.model)
        self._window = MetricWindow(differs=getattr(model, "is_grouped", False))
        runner.message_hub.update_info_dict({"max_iters": runner.max_iters, "seed": runner.seed})

    def before_train_epoch(self, runner) -> None:
        """Start the clock and the bar, after other hooks measured the starting point."""
        done, total = runner.iter, runner.max_iters
        self._clock = RunClock(done=done, total=total)
        self._start_interval()
        if self._wants_bar and is_main_process():
            self._bar = ProgressBar(runner.logger, total=total, done=done)

    def before_train_iter(self, runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Tell those who have no runner which step it is."""
        runner.message_hub.update_info("iter", runner.iter)

    def after_train_iter(
        self,
        runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict[str, Tensor | float] | None = None,
    ) -> None:
        """Collect the step's metrics; at the end of an interval average and write them."""
        loop = runner.train_loop
        self._steps += 1
        self._data_seconds += loop.data_seconds
        self._window.add(outputs or {})
        done = runner.iter + 1
        if done % self.interval == 0 or done in (1, runner.max_iters):
            values = self._window.take()
            # the read above waited for the device, so the clock now counts its work as well
            self._train_seconds += time.perf_counter() - loop.step_began
            self._write(runner, done, {**values, **self._rates(loop)})
            self._start_interval()
        else:
            self._train_seconds += time.perf_counter() - loop.step_began
        if self._bar is not None:
            self._bar.advance()

    def after_train(self, runner) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _start_interval(self) -> None:
        self._steps = 0
        self._train_seconds = 0.0
        self._data_seconds = 0.0

    def _rates(self, loop) -> dict[str, float]:
        rates = {
            "img_per_s": self._steps * loop.layout.global_batch_size / self._train_seconds,
            "data_wait": self._data_seconds / self._train_seconds,
        }
        if loop.dataloader.num_broken:
            rates["broken_images"] = loop.dataloader.num_broken
        return rates

    def _write(self, runner, done: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            runner.message_hub.update_scalar(f"train/{name}", value)
        runner.visualizer.add_scalars(values, step=done)
        shown = [name for name in SHOWN if name in values]
        students = [name for name in values if name.startswith(PREFIX) and name.endswith("/loss")]
        losses = "  ".join(f"{name} {values[name]:.4f}" for name in (*shown, *students))
        rates = (
            f"{values['img_per_s']:.0f} img/s  data wait {values['data_wait']:.0%}  "
            f"eta {self._clock.eta(done)}  {memory_text()}"
        )
        runner.logger.info(
            f"iter {done}/{runner.max_iters}  {losses}  {rates}",
            extra={"on_bar": True} if self._bar is not None else None,
        )
        if self._bar is not None:
            loss = "  ".join(
                f"{values[name]:.4f}" for name in ("loss", *students) if name in values
            )
            self._bar.show(f"loss {loss}  {rates}")


# --- Means over a log interval, with one read from the device ---


class MetricWindow:
    """Collects scalars as they come and averages them when asked.

    Adding keeps a reference and does no work on the device, so it neither waits for the GPU nor
    launches a kernel. A metric that appears only in some steps is averaged over those.

    Args:
        differs (bool): Processes may have different metrics; each is then averaged over those that
            have it.
    """

    def __init__(self, differs: bool = False) -> None:
        self._differs = differs
        self._tensors: dict[str, list[Tensor]] = defaultdict(list)
        self._numbers: dict[str, list[float]] = defaultdict(list)

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Take one step's metrics: scalar tensors or numbers."""
        for name, value in metrics.items():
            if isinstance(value, Tensor):
                self._tensors[name].append(value)
            else:
                self._numbers[name].append(float(value))

    def take(self) -> dict[str, float]:
        """Mean of each metric since the last call, tensors also over processes; starts anew.

        Every process must call it in the same step, with the same metrics unless they differ.
        """
        means = {name: sum(values) / len(values) for name, values in self._numbers.items()}
        if self._tensors:
            rows = [torch.stack(values).float().mean() for values in self._tensors.values()]
            device = rows[0].device
            stacked = torch.stack([row.to(device) for row in rows])
            if not self._differs:
                all_reduce(stacked, "mean")
            means.update(zip(self._tensors, stacked.tolist(), strict=True))
        self._tensors.clear()
        self._numbers.clear()
        return _mean_of_those_who_have(all_gather_object(means)) if self._differs else means


def _mean_of_those_who_have(parts: list[dict[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for part in parts:
        for name, value in part.items():
            values[name].append(value)
    return {name: sum(each) / len(each) for name, each in values.items()}


# --- A live bar on a terminal, lines elsewhere ---


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
