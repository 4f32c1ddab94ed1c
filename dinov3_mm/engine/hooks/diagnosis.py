"""Measures how healthy the representation is, every so many iterations."""

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

PREFIX = "diag/"


@HOOKS.register_module()
class DiagnosisHook(Hook):
    """Has the model compute its diagnostics in one iteration out of ``interval``.

    The first iteration of a run is diagnosed too: its values are those of the initial weights. The
    ``diag/...`` entries of the step's outputs become numbers, averaged over processes, which the
    writers get like any metric, and one log line.

    Args:
        interval: Iterations between two diagnoses.

    Raises:
        ValueError: ``interval`` is not a positive integer.
    """

    priority = "ABOVE_NORMAL"

    def __init__(self, interval: int = 200):
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be an integer >= 1, given {interval!r}")
        self.interval = interval

    def before_train_iter(self, runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Switch the model's diagnostics on or off for this iteration."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model.collect_diagnostics = runner.iter % self.interval == 0

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        """Read the diagnostics and log them."""
        names = [name for name in outputs if name.startswith(PREFIX)]
        if not names:
            return
        values = torch.stack([outputs[name].detach().float() for name in names])
        all_reduce(values, "mean")
        outputs.update(zip(names, values.tolist(), strict=True))
        shown = "  ".join(f"{name.removeprefix(PREFIX)} {outputs[name]:.4g}" for name in names)
        runner.logger.info(f"diagnosis after iteration {runner.iter + 1}: {shown}")
