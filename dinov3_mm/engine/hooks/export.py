"""The teacher's backbone as a file for users: safetensors plus JSON, nothing of the training."""

from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from dinov3_mm.checkpoints import export_backbone
from dinov3_mm.engine.runner.files import (
    export_path,
    list_exports,
    point_latest_to,
    remove,
)
from dinov3_mm.engine.runner.retention import surplus
from dinov3_mm.engine.strategy import library_versions
from dinov3_mm.engine.students.view import StudentRunner, student_runners


@HOOKS.register_module()
class ExportTeacherHook(Hook):
    """Writes ``exports/iter_<n>_teacher.safetensors``, its ``.json``, and ``teacher_latest.*``.

    The file holds the EMA teacher's backbone under the official key names and, as metadata, the
    architecture, patch size, number of registers, image statistics and provenance (config,
    iteration, seed, versions): ``build_backbone(FILE)`` needs nothing else. A backbone of more than
    10 GB becomes a folder of several files, ``exports/iter_<n>_teacher``, with ``teacher_latest`` a
    link to it; under FSDP2 it is written from the shards.

    ``PretrainCheckpointHook`` already exports with every checkpoint; register this hook for exports
    at another interval.

    Args:
        interval (int): Optimizer steps between exports; the last step exports as well.
        max_to_keep (int | None): Newest exports to keep. Defaults to None: all.

    Raises:
        ValueError: If a number is not a positive integer.
    """

    # After the teacher's update and the evaluations.
    priority = "VERY_LOW"

    def __init__(self, interval: int, max_to_keep: int | None = None) -> None:
        for name, value in (("interval", interval), ("max_to_keep", max_to_keep)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        self.interval = interval
        self.max_to_keep = max_to_keep

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Export at the interval and after the last step."""
        if self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner):
            export_teacher(runner, runner.iter + 1)
            remove_surplus_exports(runner, self.max_to_keep)


def export_teacher(runner, iteration: int) -> Path:
    """Write the teacher backbone after ``iteration`` steps; all ranks must call this.

    Of several students each has an export of its own, in ``exports/<name>``.

    Returns:
        Path: The ``.safetensors`` file or the folder; of several students that of the last of
        this rank.
    """
    for view in student_runners(runner):
        path = _export(view, iteration)
    return path


def _export(runner, iteration: int) -> Path:
    place = place_of_exports(runner)
    path = export_path(place[0], iteration, place[1])
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    mean, std = model.data_preprocessor.statistics
    provenance = {
        "config": Path(runner.cfg.filename or "").name,
        "experiment": runner.experiment_name,
        "iteration": iteration,
        "seed": runner.seed,
        "versions": library_versions(),
    }
    metadata = {"statistics": {"mean": mean, "std": std}, "provenance": provenance}
    path = export_backbone(model.teacher_backbone, path, metadata)
    if is_main_process():
        point_latest_to(path)
    return path


def remove_surplus_exports(runner, max_to_keep: int | None, keep_every: int | None = None) -> None:
    """Delete old exports from the main process; ``teacher_latest`` always stays."""
    for view in student_runners(runner):
        if is_main_process():
            for path in surplus(list_exports(*place_of_exports(view)), max_to_keep, keep_every):
                remove(path)
                path.with_suffix(".json").unlink(missing_ok=True)


def place_of_exports(runner) -> tuple[str, str | None]:
    """Work folder of the run, and the student's name where the runner is that of a student."""
    if isinstance(runner, StudentRunner):
        return runner.run_dir, runner.student_name
    return runner.work_dir, None
