"""Runs with several students: their strategy, and the runner as one student's hooks see it."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import STRATEGIES
from torch import distributed as dist
from torch import nn

from dinov3_mm.datasets.order import torch_seed
from dinov3_mm.engine.launch import failing_together
from dinov3_mm.engine.training_state import (
    STATE_FILE,
    begin,
    finish,
    load_model_state,
    partial_folder,
    read_training_state,
    write_training_state,
)
from dinov3_mm.models.pretraining.groups import group_as_world
from dinov3_mm.models.pretraining.multi_distillation import PREFIX
from dinov3_mm.models.wrapping import unwrapped

from .ddp import BEFORE_THE_FIRST_STEP, DDP_SETTINGS, PretrainStrategy, training_device

# --- The runner as one student's hooks see it ---


class StudentRunner:
    """A runner whose model, optimizer, work folder and metric names are those of one student.

    Everything else is the run's. Hooks must be called within :meth:`as_world`.

    Args:
        runner: of a run with :class:`MultiDistillation`.
        name: a student of this rank.

    Attributes:
        student_name (str): the name.
        run_dir (str): work folder of the whole run.
        work_dir (str): ``<run_dir>/students/<name>``: records, captures, log.
        hooks (list): the student's hooks.
    """

    def __init__(self, runner: Any, name: str) -> None:
        self._runner = runner
        self.student_name = name
        self.run_dir = runner.work_dir
        self.work_dir = str(Path(runner.work_dir) / "students" / name)
        self.hooks: list = []
        self.visualizer = _Prefixed(runner.visualizer, f"{PREFIX}{name}/")
        self.message_hub = _Prefixed(runner.message_hub, f"{PREFIX}{name}/")
        with self.as_world():
            self.logger = self._build_logger()

    def __getattr__(self, key: str) -> Any:
        return getattr(self._runner, key)

    @property
    def model(self) -> Any:
        """The student, perhaps in a distributed wrapper."""
        return self._runner.model.students[self.student_name]

    @property
    def optim_wrapper(self) -> Any:
        """The student's optimizer wrapper."""
        return self._runner.optim_wrapper[self.student_name]

    @property
    def rank(self) -> int:
        """Position of this process among those of the student."""
        return get_rank()

    @property
    def world_size(self) -> int:
        """Processes of the student."""
        return get_world_size()

    def as_world(self) -> AbstractContextManager:
        """Make the student's ranks the whole world."""
        return group_as_world(self._runner.model.groups[self.student_name])

    def _build_logger(self) -> logging.LoggerAdapter:
        """The run's log on its first rank; a file of the student where another rank is its first.

        MMEngine's logger is silent on other ranks.
        """
        prefix = {"student": self.student_name}
        if self._runner.rank == 0 or not is_main_process():
            return _Named(self._runner.logger, prefix)
        logger = logging.getLogger(f"dinov3_mm.{self._runner.experiment_name}.{self.student_name}")
        if not logger.handlers:
            logger.setLevel(logging.INFO)
            logger.propagate = False
            Path(self.work_dir).mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(Path(self.work_dir) / "log.txt")
            handler.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"))
            logger.addHandler(handler)
        return _Named(logger, prefix)


class _Named(logging.LoggerAdapter):
    """Messages that begin with the student's name."""

    def process(self, msg: str, kwargs: dict) -> tuple[str, dict]:
        return f"{self.extra['student']}: {msg}", kwargs


class _Prefixed:
    """A writer or message hub under whose names the student's stand."""

    def __init__(self, target: Any, prefix: str) -> None:
        self._target, self._prefix = target, prefix

    def __getattr__(self, key: str) -> Any:
        return getattr(self._target, key)

    def add_scalars(self, values: Mapping[str, float], **kwargs: Any) -> None:
        self._target.add_scalars(self._named(values), **kwargs)

    def update_scalars(self, values: Mapping[str, float], **kwargs: Any) -> None:
        self._target.update_scalars(self._named(values), **kwargs)

    def _named(self, values: Mapping[str, float]) -> dict[str, float]:
        return {f"{self._prefix}{name}": value for name, value in values.items()}


def student_runners(runner: Any) -> Iterator[Any]:
    """For each student of this rank a view of the runner, within its world; else the runner."""
    model = unwrapped(runner.model)
    if not hasattr(model, "students"):
        yield runner
        return
    for name in model.students:
        view = StudentRunner(runner, name)
        with view.as_world():
            yield view


# --- The strategy ---


STUDENTS = "students"


@STRATEGIES.register_module()
class MultiDistillationStrategy(PretrainStrategy):
    """One process or many; the gradients of a student are averaged over the ranks that train it.

    A checkpoint is a folder::

        iter_00001000/state.pth             meta data of the run
        iter_00001000/students/NAME.pth     all of a student, written by the first of its ranks

    A student's file is a training checkpoint of ``DINOv3``: it can be continued alone. The folder
    is resumed on any number of processes, in groups or together.

    Args:
        model_wrapper (dict, optional): Further arguments of ``MMDistributedDataParallel``.
        **kwargs: See :class:`mmengine._strategy.BaseStrategy`.
    """

    saves_shards = True

    def __init__(self, *, model_wrapper: dict | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.model_wrapper = model_wrapper

    def _init_model_weights(self, model: nn.Module) -> nn.Module:
        # The same values on every rank without a broadcast: ranks hold different students.
        torch.manual_seed(torch_seed(self.seed, BEFORE_THE_FIRST_STEP))
        model.init_weights()
        return model

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if not hasattr(model, "students"):
            raise ValueError(
                f"MultiDistillationStrategy trains a MultiDistillation, not {type(model).__name__}"
            )
        model.form_groups()
        device = training_device()
        self._accelerated(model).to(device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            for name, student in list(model.students.items()):
                with group_as_world(model.groups[name]):
                    model.students[name] = MMDistributedDataParallel(
                        module=student,
                        device_ids=None if device.type == "cpu" else [device.index],
                        **{**DDP_SETTINGS, **(self.model_wrapper or {})},
                    )
        for name in model.student_names:
            ranks = model.placement[name].ranks
            where = "all ranks" if ranks is None else f"ranks {ranks[0]} to {ranks[-1]}"
            self.logger.info(f"student {name}: on {where}, tokens {model.strides[name]} px apart")
        return model

    def save_checkpoint(
        self,
        filename: str,
        *,
        extra_ckpt: dict | None = None,
        callback: Callable[[dict], None] | None = None,
        **_,
    ) -> None:
        """Write the folder; all ranks must call this."""
        folder = Path(filename)
        begin(folder)
        partial = partial_folder(folder)
        state = self._plain_state(extra_ckpt)
        if callback is not None:
            callback(state)
        with failing_together():
            (partial / STUDENTS).mkdir(exist_ok=True)
            self._write_own(partial / STUDENTS, state, state.pop(STUDENTS, {}))
            if is_main_process():
                write_training_state(partial / STATE_FILE, state)
        finish(folder)

    def _write_own(self, folder: Path, state: dict, own: dict) -> None:
        """Write the students of which this rank is the first."""
        for name, student in self.model.local_students():
            if self.model.placement[name].index == 0:
                tensors = {key: value.cpu() for key, value in student.state_dict().items()}
                stored = {
                    **{key: value for key, value in state.items() if key == "meta"},
                    **own.get(name, {}),
                    "state_dict": tensors,
                    "optimizer": self.optim_wrapper[name].state_dict(),
                }
                write_training_state(folder / f"{name}.pth", stored)

    def _read_state(
        self, filename: str, callback: Callable[[dict], None] | None, *, with_optimizer: bool
    ) -> dict:
        self.logger.info(f"Load checkpoint from {filename}")
        folder = Path(filename)
        checkpoint = read_training_state(folder)
        if not (folder / STUDENTS).is_dir():
            raise ValueError(
                f"{folder} is no checkpoint of a run with several students: it has no folder "
                f"{STUDENTS}. A single student's weights are given as model.students.NAME."
                "start_from"
            )
        checkpoint[STUDENTS] = {}
        for name, student in self.model.local_students():
            stored = read_training_state(folder / STUDENTS / f"{name}.pth")
            load_model_state(student, stored.pop("state_dict"))
            optimizer = stored.pop("optimizer")
            if with_optimizer:
                self.optim_wrapper[name].load_state_dict(optimizer)
            checkpoint[STUDENTS][name] = stored
        if callback is not None:
            callback(checkpoint)
        self.logger.info(f"loaded the students {', '.join(checkpoint[STUDENTS])} of this rank")
        return checkpoint
