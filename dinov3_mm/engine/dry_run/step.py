"""One whole training step on fake tensors, watched."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

from mmengine.config import Config
from mmengine.optim import OptimWrapperDict
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._pytree import tree_leaves

from dinov3_mm.engine.hooks import TeacherEMAHook
from dinov3_mm.engine.optim import PretrainOptimWrapper
from dinov3_mm.errors import ConfigError
from dinov3_mm.models.wrapping import unwrapped

from .batches import CropSet, describe_batch, make_batch
from .collectives import Collective, CollectiveLog
from .memory import BATCH, GRADIENTS, OPTIMIZER, MemoryLedger, Peak
from .model import all_networks, students_of, wrappers_of
from .schedules import Schedules

# Kind of memory by network.
NETWORK_KINDS = {
    "student": "parameters (student)",
    "teacher": "EMA teacher",
    "gram_teacher": "Gram teacher",
    "distillation_teacher": "distillation teacher",
}


@dataclass(frozen=True)
class StepRecord:
    """What a step of one set of crop sizes takes.

    Attributes:
        crops: the crop sizes.
        batch: name, shape and dtype of the tensors of a rank's micro batch.
        peak: fullest moment of the step.
        resident: bytes by kind between two steps.
        collectives: kind, calls and bytes, the largest first.
    """

    crops: CropSet
    batch: list[tuple[str, str, str]]
    peak: Peak
    resident: dict[str, int]
    collectives: list[tuple[Collective, int, int]]


class UnpredictableStepError(RuntimeError):
    """A step whose shapes or branches depend on values."""


def run_step(
    model: nn.Module,
    optim_wrapper: PretrainOptimWrapper | OptimWrapperDict,
    cfg: Config,
    crops: CropSet,
    schedules: dict[str, Schedules],
    ledger: MemoryLedger,
    *,
    channels: int,
    on_gpu: bool = True,
) -> StepRecord:
    """Run forward, backward, clipping, optimizer and EMA of the last iteration.

    Args:
        model: wrapped algorithm.
        optim_wrapper: its optimizer, or those of its students.
        cfg: completed config.
        crops: sizes of the step.
        schedules: give the step its values, by student.
        ledger: has booked model and optimizer, and is active.
        channels: of the images.
        on_gpu: update the teacher as on a GPU.

    Raises:
        ConfigError: The model refuses the batch.
        UnpredictableStepError: The step reads a value.
    """
    algorithm, log = unwrapped(model), CollectiveLog()
    last = cfg.train_cfg["max_iters"] - 1
    for name, student in students_of(algorithm).items():
        known = schedules[name]
        student.set_step(**{key: known.values[key](last) for key in known.step_values})
    accumulate = cfg.train_cfg.get("accumulate", 1)
    start = len(ledger.events)
    batch = make_batch(cfg, crops, channels)
    ledger.tell(BATCH, tree_leaves(batch))
    try:
        with log, ExitStack() as watched:
            # What the step gets, on the device.
            received = algorithm.data_preprocessor.register_forward_hook(
                lambda module, args, out: ledger.tell(BATCH, tree_leaves(out))
            )
            watched.callback(received.remove)
            for wrapper in wrappers_of(optim_wrapper):
                watched.enter_context(_watching_steps(wrapper, ledger, log))
            model.train()
            for index in range(accumulate):
                ledger.phase = log.phase = (
                    f"forward pass {index + 1}" if accumulate > 1 else "forward pass"
                )
                model.train_step(batch, optim_wrapper)
            ledger.phase = log.phase = "EMA update"
            for (name, student), wrapper in zip(
                students_of(algorithm).items(), wrappers_of(optim_wrapper), strict=True
            ):
                _update_teacher(student, wrapper, schedules[name], last, on_gpu)
    except DataDependentOutputException as error:
        raise UnpredictableStepError(
            f"the step reads a value of a tensor ({error.func}), which would also make the host "
            "wait for the GPU in each iteration; decide on the device instead"
        ) from error
    except ValueError as error:
        raise ConfigError(f"crops {crops}: {error}") from error
    shapes = describe_batch(batch)
    peak = ledger.peak(start)
    del batch
    return StepRecord(crops, shapes, peak, ledger.by_kind(), log.rows())


def _update_teacher(
    student: nn.Module,
    wrapper: PretrainOptimWrapper,
    schedules: Schedules,
    iteration: int,
    on_gpu: bool,
) -> None:
    """As the hook does it; on the CPU it asks whether the step was skipped, which has no answer."""
    if not on_gpu:
        student.update_teacher(schedules.values["momentum"](iteration))
        return
    hook = schedules.hooks[TeacherEMAHook]
    hook.model = student
    runner = SimpleNamespace(iter=iteration, optim_wrapper=wrapper)
    hook.after_train_iter(runner, 0, outputs={})


def tell_state(
    ledger: MemoryLedger, algorithm: nn.Module, optim_wrapper: PretrainOptimWrapper
) -> None:
    """Book parameters by network, buffers and the state of the optimizer."""
    ledger.tell("buffers", algorithm.buffers())
    for name, network in all_networks(algorithm):
        kind = name.rsplit(": ", 1)[-1].partition(".")[0]  # one of several teachers has a name
        ledger.tell(NETWORK_KINDS[kind], network.parameters())
    for wrapper in wrappers_of(optim_wrapper):
        for state in wrapper.optimizer.state.values():
            ledger.tell(OPTIMIZER, state.values())


@contextmanager
def _watching_steps(
    wrapper: PretrainOptimWrapper, ledger: MemoryLedger, log: CollectiveLog
) -> Iterator[None]:
    """Context in which the optimizer's steps are a part of their own."""
    take_step = wrapper.step

    def step(**kwargs) -> None:
        groups, phase = wrapper.param_groups, ledger.phase
        ledger.tell(GRADIENTS, (param.grad for group in groups for param in group["params"]))
        ledger.phase = log.phase = "optimizer step"
        take_step(**kwargs)
        ledger.phase = log.phase = phase

    wrapper.step = step
    try:
        yield
    finally:
        del wrapper.step
