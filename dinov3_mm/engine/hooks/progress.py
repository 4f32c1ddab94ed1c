"""Progress and metrics of a pretraining run."""

import sys
import time

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor

from dinov3_mm.models.pretraining.multi_distillation import PREFIX

from .console import ProgressBar, RunClock, memory_text
from .metric_window import MetricWindow

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
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
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
