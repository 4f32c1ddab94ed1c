"""A training step as a file: what went into it, and running it again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dinov3_mm.engine.runner.training_state import (
    load_model_state,
    read_training_state,
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


@dataclass
class ReplayReport:
    """What a captured step did when it was run again.

    Attributes:
        iteration: Zero-based iteration of the step.
        losses: Metrics of each micro batch.
        grad_norms: Gradient norm of each student sub-module over all micro batches.
        first_bad_module: Name of the first module, in order of execution, whose output was not
            finite; ``None`` if all were.
        bad_parameters: Student parameters that are not finite themselves.
    """

    iteration: int
    losses: list[dict[str, float]]
    grad_norms: dict[str, float]
    first_bad_module: str | None
    bad_parameters: list[str]

    @property
    def is_finite(self) -> bool:
        """Whether every loss and gradient norm was finite."""
        values = [*self.grad_norms.values(), *(losses["loss"] for losses in self.losses)]
        return bool(torch.tensor(values).isfinite().all())


def replay_capture(path: str | Path, cfg: Config, device: str = "cpu") -> ReplayReport:
    """Run the forward and backward pass of a captured step again.

    The numbers are those of the run when it was one process on the same kind of device. Of several
    processes a capture holds one's micro batches, and losses that look at all processes' samples
    see only these.

    Args:
        path: File of :class:`dinov3_mm.engine.hooks.NonFiniteGuardHook`.
        cfg: Config of the run.
        device: Where to run.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is damaged, is no capture, or is of another model than ``cfg``.
    """
    state = read_training_state(path)
    if "step" not in state:
        raise ValueError(f"{path} is a training checkpoint, not a capture of a step")
    model = MODELS.build(cfg.model)
    load_model_state(model, state["state_dict"])
    _load_distillation_teacher(model, cfg)
    model.to(device).train()
    step = StepInputs(**state["step"])
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
        losses=losses,
        grad_norms=_gradient_norms(model.student),
        first_bad_module=next(iter(bad_modules), None),
        bad_parameters=[
            name for name, param in model.student.named_parameters() if not param.isfinite().all()
        ],
    )


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
