"""The runner as one student's hooks see it."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.model import is_model_wrapper

from dinov3_mm.models.pretraining.groups import group_as_world
from dinov3_mm.models.pretraining.multi_distillation import PREFIX


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
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if not hasattr(model, "students"):
        yield runner
        return
    for name in model.students:
        view = StudentRunner(runner, name)
        with view.as_world():
            yield view
