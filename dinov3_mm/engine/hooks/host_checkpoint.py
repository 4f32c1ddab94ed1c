"""Checkpoints of downstream runs: complete under their name, and the old one until then."""

import os
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

from dinov3_mm.checkpoints.io import PARTIAL_SUFFIX, atomic_write, flush_to_disk


@HOOKS.register_module()
class HostCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook``, for runs that may be killed while they save.

    MMEngine's own deletes the oldest checkpoint, which with ``max_keep_ckpts=1`` is the only one,
    and then writes the new one under its final name. This one writes aside, renames, and deletes
    last. Names and contents of the files are the same, and so are the arguments.

    :func:`write_aside` puts it in the place of the other.
    """

    def before_run(self, runner) -> None:
        """Remove what a killed run left half-written."""
        if is_main_process():
            for path in self._folder(runner).glob(f".*.pth{PARTIAL_SUFFIX}"):
                path.unlink()
                runner.logger.warning(f"removed {path}, left half-written by a killed run")

    def _folder(self, runner) -> Path:
        folder = Path(runner.work_dir)
        is_set = self.out_dir is not None and Path(self.out_dir) != folder
        return Path(self.out_dir) / folder.name if is_set else folder

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        name = self.filename_tmpl.format(step)
        old: list[int] = []
        if self.max_keep_ckpts > 0:
            steps = [*(each for each in self.keep_ckpt_ids if each != step), step]
            old = steps[: -self.max_keep_ckpts]
            self.keep_ckpt_ids.clear()
            self.keep_ckpt_ids.extend(steps)
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        partial = f".{name}{PARTIAL_SUFFIX}"
        runner.save_checkpoint(
            self.out_dir,
            partial,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if not is_main_process():
            return
        folder = Path(self.out_dir)
        flush_to_disk(folder / partial)
        os.replace(folder / partial, folder / name)
        with atomic_write(Path(runner.work_dir) / "last_checkpoint") as path:
            path.write_text(self.last_ckpt)
        for each in old:
            (folder / self.filename_tmpl.format(each)).unlink(missing_ok=True)


def write_aside(cfg: Config) -> None:
    """Let a downstream run save with :class:`HostCheckpointHook` in the place of MMEngine's hook.

    Another hook, and folders that are not on a disk, stay as they are.
    """
    hook = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
    if hook.get("type") == "CheckpointHook" and "://" not in str(hook.get("out_dir")):
        hook["type"] = HostCheckpointHook.__name__
