"""Guards that end a run which cannot recover, and the measurement that they look at."""

import math
from pathlib import Path

import torch
from mmengine.dist import all_gather_object, all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor
from torch.distributed.tensor import DTensor

from dinov3_mm.engine.capture import StepInputs, random_state, write_capture, write_sharded_capture
from dinov3_mm.models.wrapping import unwrapped

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
        model = unwrapped(runner.model)
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


# --- Guards ---


DIVERSITY = ("feature_rank", "cls_spread")

# A run counts as collapsed below this share of the diversity that it once had.
LOST_SHARE = 0.1


class TrainingStoppedError(RuntimeError):
    """A guard found that going on is useless; the message says what to do."""


class _PendingFlag:
    """A device flag on its way to the host: read at once on the CPU, when it has come on CUDA."""

    def __init__(self, flag: Tensor):
        self.is_late = flag.is_cuda
        self._value = flag.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if self.is_late else None
        if self.is_late:
            self._arrived.record()

    def read(self) -> bool:
        """Return the value, waiting for it if need be."""
        if self.is_late:
            self._arrived.synchronize()
        return bool(self._value)


@HOOKS.register_module()
class NonFiniteGuardHook(Hook):
    """Captures steps with a non-finite loss or gradient and stops after several in a row.

    The optimizer wrapper skips such steps; this hook warns, and writes
    ``work_dir/captures/iter_<n>.pt`` (with several processes ``iter_<n>_rank<r>.pt`` of those whose
    loss was bad; of a model in shards a folder ``iter_<n>`` from all processes), which
    ``tools/replay_capture.py`` runs again. On CUDA the flag is read just
    before the next step changes anything, so the host never waits for the device.

    Args:
        max_consecutive: The run stops at this many bad steps in a row.
        max_captures: Captures to write in one run.

    Raises:
        ValueError: A number that is not a positive integer.
        TrainingStoppedError: In training, at the last of ``max_consecutive`` bad steps.
    """

    priority = "ABOVE_NORMAL"

    def __init__(self, max_consecutive: int = 3, max_captures: int = 3):
        for name, value in (("max_consecutive", max_consecutive), ("max_captures", max_captures)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, given {value!r}")
        self.max_consecutive = max_consecutive
        self.max_captures = max_captures
        self._consecutive = 0
        self._num_captures = 0
        self._step: StepInputs | None = None
        self._pending: tuple[_PendingFlag, StepInputs] | None = None

    def before_train(self, runner) -> None:
        """Watch what enters the model and what is about to change it."""
        model = unwrapped(runner.model)
        self._handles = [
            model.data_preprocessor.register_forward_pre_hook(
                lambda module, args: self._record_batch(model, args[0])
            ),
            runner.optim_wrapper.optimizer.register_step_pre_hook(
                lambda *_: self._resolve(runner, model)
            ),
        ]
        self._model = model

    def before_train_iter(self, runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Begin the record of a step."""
        self._step = StepInputs(runner.iter, batches=[], rng={}, step_values={}, outputs={})

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        """Ask whether the step was skipped."""
        step, self._step = self._step, None
        step.outputs = dict(outputs)
        self._pending = _PendingFlag(runner.optim_wrapper.step_skipped), step
        if not self._pending[0].is_late:
            self._resolve(runner, self._model)

    def after_train(self, runner) -> None:
        """Resolve the last step and stop watching."""
        self._resolve(runner, self._model)
        for handle in self._handles:
            handle.remove()

    def _record_batch(self, model, batch: dict) -> None:
        if self._step is None:
            return
        if not self._step.batches:
            self._step.rng = random_state(next(model.parameters()).device)
            self._step.step_values = dict(model.step_values)
        self._step.batches.append(dict(batch))

    def _resolve(self, runner, model) -> None:
        """Read the pending flag; the model is still as it was before the step it speaks of."""
        if self._pending is None:
            return
        (flag, step), self._pending = self._pending, None
        if not flag.read():
            self._consecutive = 0
            return
        self._consecutive += 1
        step.outputs = {name: float(value) for name, value in step.outputs.items()}
        is_loss_bad = not math.isfinite(step.outputs["loss"])
        bad_ranks = [rank for rank, bad in enumerate(all_gather_object(is_loss_bad)) if bad]
        place = self._capture(runner, model, step, bad_ranks)
        cause = f"loss on rank(s) {bad_ranks}" if bad_ranks else "gradient, with finite losses"
        runner.logger.warning(
            f"iteration {step.iteration}: non-finite {cause}; the step was skipped "
            f"({self._consecutive} in a row). {place}"
        )
        if self._consecutive >= self.max_consecutive:
            raise TrainingStoppedError(
                f"{self._consecutive} steps in a row up to iteration {step.iteration} had a "
                f"non-finite {cause}. {place} Usual causes: a learning rate scaled for a larger "
                "batch, a missing clip_grad, a KoLeo group of one image, fp16. Lower the learning "
                "rate or lengthen its warm-up and resume from the last checkpoint."
            )

    def _capture(self, runner, model, step: StepInputs, bad_ranks: list[int]) -> str:
        """Write the step and say where it is; all ranks come here, for they skip together."""
        if self._num_captures >= self.max_captures:
            return f"Not captured: {self.max_captures} captures were written already."
        self._num_captures += 1
        folder = Path(runner.work_dir) / "captures"
        name = f"iter_{step.iteration:08d}"
        about = {"seed": runner.seed, "rank": runner.rank, "world_size": runner.world_size}
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            # A rank has a shard of every parameter: whoever is bad, all are needed.
            write_sharded_capture(folder / name, step, model, bad_ranks=bad_ranks, **about)
            return f"Captured in {folder}/{name}: run it again with tools/replay_capture.py."
        ranks = bad_ranks or [0]
        several = runner.world_size > 1
        names = {rank: f"{name}_rank{rank}.pt" if several else f"{name}.pt" for rank in ranks}
        if runner.rank in names:
            path = folder / names[runner.rank]
            write_capture(path, step, model, runner.optim_wrapper, **about)
        return f"Captured in {folder}/{names[ranks[0]]}: run it again with tools/replay_capture.py."


@HOOKS.register_module()
class CollapseGuardHook(Hook):
    """Stops a run whose representation has collapsed.

    A diagnosis counts as collapsed when the teacher's targets are uniform (their entropy is at its
    bound) and the features have lost their diversity: effective rank or spread is below that of the
    initial weights, or below a tenth of the largest that the run has shown. ``patience`` such
    diagnoses in a row stop the run. Uniform targets alone do not: a healthy run begins with them.

    Args:
        patience: Consecutive collapsed diagnoses that stop the run.
        begin: Iteration from which diagnoses count; by default the end of the learning rate's
            warm-up, the backbone's included.
        entropy_tolerance: How far below its bound the entropy still counts as uniform, in nats.

    Raises:
        ValueError: A bad number, or a run without ``DiagnosisHook``.
        TrainingStoppedError: In training, when the representation has collapsed.
    """

    priority = "NORMAL"

    def __init__(
        self, patience: int = 3, begin: int | None = None, entropy_tolerance: float = 1e-3
    ):
        if not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience must be an integer >= 1, given {patience!r}")
        if begin is not None and (not isinstance(begin, int) or begin < 0):
            raise ValueError(f"begin must be an integer >= 0 or None, given {begin!r}")
        if entropy_tolerance < 0:
            raise ValueError(f"entropy_tolerance must not be negative, given {entropy_tolerance}")
        self.patience = patience
        self.begin = begin
        self.entropy_tolerance = entropy_tolerance
        self._initial: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._consecutive = 0

    def before_train(self, runner) -> None:
        """Find the diagnoses and the end of the warm-up."""
        hooks = {type(hook).__name__: hook for hook in runner.hooks}
        if "DiagnosisHook" not in hooks:
            raise ValueError("CollapseGuardHook needs DiagnosisHook in custom_hooks")
        schedule = hooks.get("OptimScheduleHook")
        warmup = 0
        if schedule is not None:
            # Under a frozen backbone and random heads all targets are uniform for a while.
            warmup = max(getattr(schedule.lr, "warmup_iters", 0), schedule.head_start_iters)
        self._armed_from = warmup if self.begin is None else self.begin

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        """Judge a diagnosis, if there is one."""
        if "diag/teacher_entropy" not in outputs:
            return
        now = {name: outputs[f"diag/{name}"] for name in DIVERSITY}
        if not self._initial:
            self._initial = now
        gap = outputs["diag/teacher_entropy_max"] - outputs["diag/teacher_entropy"]
        is_poor = any(value < self._least(name) for name, value in now.items())
        is_collapsed = runner.iter >= self._armed_from and gap <= self.entropy_tolerance and is_poor
        self._consecutive = self._consecutive + 1 if is_collapsed else 0
        for name, value in now.items():
            self._best[name] = max(self._best.get(name, 0.0), value)
        if self._consecutive >= self.patience:
            self._stop(runner, now, gap)

    def _least(self, name: str) -> float:
        """Diversity below which features count as collapsed."""
        return max(self._initial[name], LOST_SHARE * self._best.get(name, 0.0))

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Keep the diversity seen so far for resumed runs."""
        checkpoint["collapse_guard"] = {
            "initial": self._initial,
            "best": self._best,
            "consecutive": self._consecutive,
        }

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Restore it."""
        state = checkpoint.get("collapse_guard")
        if state is not None:
            self._initial, self._best = state["initial"], state["best"]
            self._consecutive = state["consecutive"]

    def _stop(self, runner, now: dict[str, float], gap: float) -> None:
        values = ", ".join(
            f"{name} {value:.4g} (at the start {self._initial[name]:.4g}, at best "
            f"{self._best[name]:.4g})"
            for name, value in now.items()
        )
        raise TrainingStoppedError(
            f"the representation has collapsed: in {self._consecutive} diagnoses up to iteration "
            f"{runner.iter} the teacher's targets were uniform (entropy {gap:.1e} below its bound) "
            f"and the features had lost their diversity: {values}. Lower the learning rate "
            "(a rule for batches of 1024 and more is too high for a small one), lengthen its "
            "warm-up, use fewer prototypes for a small data set, keep the KoLeo loss, or raise the "
            "teacher's momentum; then go on from a checkpoint before the collapse with --resume "
            "PATH, which sets the later ones aside."
        )
