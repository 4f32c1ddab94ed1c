"""What a pretraining run writes: checkpoints, and the teacher's backbone as a file for users."""

from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop

from dinov3_mm.checkpoints import export_backbone
from dinov3_mm.engine.config.auto import RECORD
from dinov3_mm.engine.launch import StopRequest, failing_together
from dinov3_mm.engine.run_files import (
    begin_branch,
    checkpoint_path,
    export_path,
    list_checkpoints,
    list_exports,
    point_latest_to,
    record_latest,
    remove,
    remove_partial_files,
    surplus,
)
from dinov3_mm.engine.strategies.ddp import library_versions
from dinov3_mm.engine.strategies.students import StudentRunner, student_runners
from dinov3_mm.models.wrapping import unwrapped

# --- Exports ---


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
    model = unwrapped(runner.model)
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


# --- Checkpoints: in time, pruned, and on request of a scheduler ---


@HOOKS.register_module()
class PretrainCheckpointHook(Hook):
    """Saves ``checkpoints/iter_<n>.pth`` and, beside it, the teacher backbone for users.

    ``FSDP2Strategy`` saves a folder of shards, ``checkpoints/iter_<n>``, instead of the file.

    A checkpoint gets its name only when it is complete, so a run that is killed at any moment
    resumes from the last one. A run that goes on from an older one, or starts anew in a used work
    folder, first sets aside what is later: see :mod:`dinov3_mm.engine.run_files`.

    Ctrl-C, SIGTERM or SIGUSR1 saves at the end of the step and ends the run normally (with several
    processes within ten steps); the same command with ``--resume`` goes on. A second Ctrl-C ends
    the run at once.

    Args:
        interval (int): Optimizer steps between checkpoints.
        max_to_keep (int | None): Newest checkpoints and exports to keep; None keeps all.
        keep_every (int | None): Iterations divisible by it are never deleted.
        save_last (bool): Save after the last step whatever the interval.
        export (bool): Export the teacher's backbone with every checkpoint.

    Raises:
        ValueError: If a number is not a positive integer, or ``keep_every`` is no multiple of
            ``interval`` (there would be nothing to keep).
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        interval: int = 1000,
        max_to_keep: int | None = 3,
        keep_every: int | None = None,
        save_last: bool = True,
        export: bool = True,
    ) -> None:
        numbers = {"interval": interval, "max_to_keep": max_to_keep, "keep_every": keep_every}
        for name, value in numbers.items():
            optional = name != "interval" and value is None
            if not optional and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if keep_every is not None and keep_every % interval:
            raise ValueError(
                f"keep_every={keep_every} must be a multiple of interval={interval}: only "
                "checkpoints that are written can be kept"
            )
        self.interval = interval
        self.max_to_keep = max_to_keep
        self.keep_every = keep_every
        self.save_last = save_last
        self.export = export
        self.stop = StopRequest()

    def before_run(self, runner) -> None:
        """Remove what a killed run left half-written, set aside what this run does not go on from.

        The checkpoint has been read by now: a run that cannot begin leaves everything as it is.
        """
        if not isinstance(runner.train_loop, BaseLoop):
            return  # a validation or test, perhaps beside the run that trains here
        with failing_together():
            if is_main_process():
                for path in remove_partial_files(runner.work_dir):
                    runner.logger.warning(f"removed {path}, left half-written by a killed run")
                line = begin_branch(runner.work_dir, runner.iter, _origin(runner))
                if line is not None:
                    runner.logger.warning(line)

    def before_train(self, runner) -> None:
        """Listen for Ctrl-C and the scheduler."""
        self.stop.listen()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Save at the interval, after the last step and when asked to stop."""
        done = runner.iter + 1
        stops = self.stop.is_agreed(done, distributed=runner.distributed)
        is_last = done == runner.max_iters
        if stops or done % self.interval == 0 or (is_last and self.save_last):
            self._save(runner, done)
        if stops and not is_last:
            runner.logger.warning(
                f"stopped by {self.stop.in_words()} after iteration {done}; go on with --resume"
            )
            runner.train_loop.stop_training = True

    def after_train(self, runner) -> None:
        """Wait for a checkpoint that is being written; give the signals back."""
        runner.strategy.finish_saving()
        self._tidy(runner)
        self.stop.release()

    def _save(self, runner, done: int) -> None:
        sharded = runner.strategy.saves_shards
        path = checkpoint_path(runner.work_dir, done, sharded=sharded)
        layout = runner.train_loop.layout
        meta = {"global_batch_size": layout.global_batch_size, "accumulate": layout.accumulate}
        if RECORD in runner.cfg:
            meta[RECORD] = runner.cfg[RECORD].to_dict()
        runner.save_checkpoint(str(path.parent), path.name, by_epoch=False, meta=meta)
        if self.export:
            export_teacher(runner, done)
            remove_surplus_exports(runner, self.max_to_keep, self.keep_every)
        self._tidy(runner)
        how = " (in the background)" if runner.strategy.is_saving else ""
        runner.logger.info(f"saved {path}{how}")

    def _tidy(self, runner) -> None:
        """Record the newest complete checkpoint and delete those that are not kept."""
        with failing_together():
            if is_main_process():
                record_latest(runner.work_dir)
                for old in surplus(
                    list_checkpoints(runner.work_dir), self.max_to_keep, self.keep_every
                ):
                    remove(old)


def _origin(runner) -> str | Path | None:
    """The checkpoint that the run was resumed from, None if it starts anew."""
    resume = runner.cfg.get("resume")
    if isinstance(resume, str) or not resume:
        return resume or None
    return runner.cfg.get("load_from") or list_checkpoints(runner.work_dir).get(runner.iter)
