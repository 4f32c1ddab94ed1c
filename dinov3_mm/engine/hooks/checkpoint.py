"""Checkpoints of a pretraining run: written in time, pruned, and on request of a scheduler."""

from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop

from dinov3_mm.engine.autoscale import RECORD
from dinov3_mm.engine.runner.branches import begin_branch
from dinov3_mm.engine.runner.files import (
    checkpoint_path,
    list_checkpoints,
    record_latest,
    remove,
    remove_partial_files,
)
from dinov3_mm.engine.runner.launch import failing_together
from dinov3_mm.engine.runner.retention import surplus
from dinov3_mm.engine.runner.stopping import StopRequest

from .export import export_teacher, remove_surplus_exports


@HOOKS.register_module()
class PretrainCheckpointHook(Hook):
    """Saves ``checkpoints/iter_<n>.pth`` and, beside it, the teacher backbone for users.

    ``FSDP2Strategy`` saves a folder of shards, ``checkpoints/iter_<n>``, instead of the file.

    A checkpoint gets its name only when it is complete, so a run that is killed at any moment
    resumes from the last one. A run that goes on from an older one, or starts anew in a used work
    folder, first sets aside what is later: see :mod:`dinov3_mm.engine.runner.branches`.

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
