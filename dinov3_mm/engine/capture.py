"""A training step as a file: what went into it, and running it again.

Where ranks hold shards of the model, as a folder that all of them write::

    iter_00000012/
        state.pth                  which ranks had a loss that was not finite, seed, ranks in all
        step_rank0.pth ...         what entered the model of each rank
        .metadata, *.distcp        the model before the step, as in a training checkpoint
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from .launch import failing_together
from .run_files import remove
from .training_state import (
    load_model_state,
    load_sharded_state,
    read_training_state,
    save_sharded_state,
    write_training_state,
)


@dataclass
class StepInputs:
    """What a training step depends on beside the model.

    Attributes:
        iteration: Zero-based iteration.
        batches: Collated micro batches of this process (uint8 crops, masks).
        rng: Random state before the step by device type (``cpu``, ``cuda``).
        step_values: The scalars that hooks gave the model for the step.
        outputs: Metrics of the step.
    """

    iteration: int
    batches: list[dict]
    rng: dict[str, Tensor]
    step_values: dict[str, float]
    outputs: dict[str, float]


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of the generators a step draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def write_capture(
    path: str | Path, step: StepInputs, model: nn.Module, optim_wrapper: OptimWrapper, **meta
) -> None:
    """Write a step with the state it started from; the file appears when it is complete.

    Args:
        path: Target file.
        step: The step's inputs.
        model: The algorithm, in the state before the step.
        optim_wrapper: Its optimizer, in the state before the step.
        **meta: Further plain values to keep (seed, rank, ...).
    """
    state = {
        "meta": {**meta, "iteration": step.iteration},
        "step": vars(step),
        "state_dict": {key: value.cpu() for key, value in model.state_dict().items()},
        "optimizer": optim_wrapper.state_dict(),
    }
    write_training_state(path, state)


def write_sharded_capture(
    folder: str | Path,
    step: StepInputs,
    model: nn.Module,
    *,
    rank: int,
    bad_ranks: list[int],
    **meta,
) -> None:
    """Write a step of a model in shards; all ranks must call this, nothing is gathered.

    The moments of the optimizer are left out: a step that was skipped never came to them.

    Args:
        folder: Target folder; it appears when it is complete.
        step: The step's inputs on this rank.
        model: The algorithm, in the state before the step.
        rank: This rank.
        bad_ranks: Ranks whose loss was not finite.
        **meta: Further plain values to keep (seed, ...).
    """
    about = {**meta, "iteration": step.iteration}
    with failing_together():
        if is_main_process() and Path(folder).exists():
            remove(Path(folder))  # of the same step, before the run was resumed
    save_sharded_state(
        folder,
        model,
        None,
        {"meta": {**about, "bad_ranks": bad_ranks}},
        own=(_step_file(rank), {"meta": {**about, "rank": rank}, "step": vars(step)}),
    )


def captured_ranks(path: str | Path) -> list[int]:
    """Ranks of a capture that are worth running again: those whose loss was not finite.

    All ranks, if only a gradient was not finite, which is the same on every rank.

    Raises:
        FileNotFoundError: No such capture.
        ValueError: The file is damaged or is no capture.
    """
    state = read_training_state(path)
    if Path(path).is_dir():
        return state["meta"].get("bad_ranks") or list(range(state["meta"]["world_size"]))
    return [_checked(state, path)["meta"]["rank"]]


def _step_file(rank: int) -> str:
    return f"step_rank{rank}.pth"


@dataclass
class ReplayReport:
    """What a captured step did when it was run again.

    Attributes:
        iteration: Zero-based iteration of the step.
        rank: Rank of the run whose micro batches these are.
        losses: Metrics of each micro batch.
        grad_norms: Gradient norm of each student sub-module over all micro batches.
        first_bad_module: Name of the first module, in order of execution, whose output was not
            finite; ``None`` if all were.
        bad_parameters: Student parameters that are not finite themselves.
    """

    iteration: int
    rank: int
    losses: list[dict[str, float]]
    grad_norms: dict[str, float]
    first_bad_module: str | None
    bad_parameters: list[str]

    @property
    def is_finite(self) -> bool:
        """Whether every loss and gradient norm was finite."""
        values = [*self.grad_norms.values(), *(losses["loss"] for losses in self.losses)]
        return bool(torch.tensor(values).isfinite().all())


def replay_capture(
    path: str | Path, cfg: Config, device: str = "cpu", *, rank: int | None = None
) -> ReplayReport:
    """Run the forward and backward pass of a captured step again, in one process.

    The numbers are those of the run when it was one process on the same kind of device. Of several
    processes one's micro batches are run, and losses that look at all processes' samples see only
    these.

    Args:
        path: File or folder of :class:`dinov3_mm.engine.hooks.NonFiniteGuardHook`.
        cfg: Config of the run.
        device: Where to run.
        rank: Whose micro batches; by default of the first of :func:`captured_ranks`. A file holds
            those of one rank.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is damaged, is no capture, is of another model than ``cfg``, or does
            not hold the rank.
    """
    path = Path(path)
    model = MODELS.build(cfg.model)
    if path.is_dir():
        rank, captured = _open_folder(path, rank)
        load_sharded_state(path, model, None)
    else:
        captured = _checked(read_training_state(path), path)
        if rank not in (None, captured["meta"]["rank"]):
            raise ValueError(
                f"{path} holds the step of rank {captured['meta']['rank']}, not of rank {rank}; "
                "each rank whose loss was not finite has a file of its own"
            )
        rank = captured["meta"]["rank"]
        load_model_state(model, captured["state_dict"])
    _load_distillation_teacher(model, cfg)
    model.to(device).train()
    step = StepInputs(**captured["step"])
    model.set_step(**step.step_values)
    torch.set_rng_state(step.rng["cpu"])
    if "cuda" in step.rng and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(step.rng["cuda"], device)
    bad_modules = _watch_outputs(model)
    losses = []
    for batch in step.batches:
        data = model.data_preprocessor(batch, training=True)
        loss, metrics = model.parse_losses(model(**data, mode="loss"))
        (loss / len(step.batches)).backward()
        losses.append({name: float(value) for name, value in metrics.items()})
    return ReplayReport(
        iteration=step.iteration,
        rank=rank,
        losses=losses,
        grad_norms=_gradient_norms(model.student),
        first_bad_module=next(iter(bad_modules), None),
        bad_parameters=[
            name for name, param in model.student.named_parameters() if not param.isfinite().all()
        ],
    )


def _checked(state: dict, path: Path | str) -> dict:
    if "step" not in state:
        raise ValueError(f"{path} is a training checkpoint, not a capture of a step")
    return state


def _open_folder(folder: Path, rank: int | None) -> tuple[int, dict]:
    """A rank of a capture in shards, by default the first bad one, and what entered its model."""
    rank = captured_ranks(folder)[0] if rank is None else rank
    files = sorted(folder.glob("step_rank*.pth"))
    if not files:
        raise ValueError(f"{folder} is a training checkpoint, not a capture of a step")
    if not (folder / _step_file(rank)).is_file():
        raise ValueError(f"{folder} holds the ranks 0 to {len(files) - 1}, not rank {rank}")
    return rank, read_training_state(folder / _step_file(rank))


def _load_distillation_teacher(model: nn.Module, cfg: Config) -> None:
    """A capture, like a checkpoint, does not hold the frozen teacher: its file does."""
    teacher = getattr(model, "distillation_teacher", None)
    if teacher is None:
        return
    hooks = cfg.get("custom_hooks") or []
    files = [hook["checkpoint"] for hook in hooks if hook["type"] == "DistillationHook"]
    teacher.load(files[0])


def _gradient_norms(student: nn.Module) -> dict[str, float]:
    return {
        name: float(get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))
        for name, module in student.named_children()
    }


def _watch_outputs(model: nn.Module) -> list[str]:
    """Return a list to which every module with a non-finite output adds its name, in order."""
    bad: list[str] = []

    def watch(name: str):
        def hook(module, args, output):
            if not all(tensor.isfinite().all() for tensor in _tensors(output)):
                bad.append(name)

        return hook

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(watch(name))
    return bad


def _tensors(value) -> list[Tensor]:
    """All floating-point tensors inside nested containers."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
