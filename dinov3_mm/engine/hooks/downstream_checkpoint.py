"""Checkpoints of downstream runs: complete or absent, and without frozen backbones."""

import os
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from torch import nn

from dinov3_mm.checkpoints.frozen import fingerprint, make_record, record_to_tensor
from dinov3_mm.checkpoints.io import PARTIAL_SUFFIX, atomic_write, flush_to_disk
from dinov3_mm.engine.launch import SavedAndStoppedError, StopRequest
from dinov3_mm.models.backbones.outputs import RECORD, RecordedWeights
from dinov3_mm.models.wrapping import unwrapped

# In the message hub of a checkpoint within an epoch: its name, until the next one replaces it.
_STOPGAP = "dinov3_mm_stopgap"


@HOOKS.register_module()
class HostCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook``, for runs that may be killed while they save.

    MMEngine's own deletes the oldest checkpoint, which with ``max_keep_ckpts=1`` is the only one,
    and then writes the new one under its final name. This one writes aside, renames, and deletes
    last. Names and contents of the files are the same, and so are the arguments.

    Ctrl-C, SIGTERM or SIGUSR1 saves at the end of the iteration (with several processes within ten)
    and ends the run normally; ``--resume`` goes on. Within an epoch the file is
    ``iter_<n>.pth``, which the next checkpoint replaces. A second Ctrl-C ends the run at once.

    :func:`write_aside` puts it in the place of the other.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.stop = StopRequest()
        self._last_step: int | None = None

    def before_run(self, runner) -> None:
        """Remove what a killed run left half-written."""
        if is_main_process():
            for path in self._folder(runner).glob(f".*.pth{PARTIAL_SUFFIX}"):
                path.unlink()
                runner.logger.warning(f"removed {path}, left half-written by a killed run")

    def before_train(self, runner) -> None:
        """Listen for Ctrl-C and the scheduler."""
        super().before_train(runner)
        self.stop.listen()

    def after_train(self, runner) -> None:
        """Give the signals back."""
        super().after_train(runner)
        self.stop.release()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Save at the interval, after the last iteration and when asked to stop.

        Raises:
            SavedAndStoppedError: when asked to stop.
        """
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        done = runner.iter + 1
        asked = self.stop.is_agreed(done, distributed=runner.distributed)
        if not asked or done == runner.max_iters:
            return
        if self.by_epoch or self._last_step != done:
            self._save_stopgap(runner, done)
        runner.logger.warning(
            f"stopped by {self.stop.in_words()} after iteration {done}; go on with --resume"
        )
        raise SavedAndStoppedError

    def _save_stopgap(self, runner, done: int) -> None:
        """Save between two checkpoints."""
        name = f"iter_{done}.pth"
        runner.message_hub.update_info(_STOPGAP, name)
        self._write(runner, name, {"epoch": runner.epoch, "iter": done}, by_epoch=False)
        runner.logger.info(f"saved {self.last_ckpt}")

    def _folder(self, runner) -> Path:
        folder = Path(runner.work_dir)
        is_set = self.out_dir is not None and Path(self.out_dir) != folder
        return Path(self.out_dir) / folder.name if is_set else folder

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        """Save, and only then delete what is one too many."""
        name = self.filename_tmpl.format(step)
        old: list[int] = []
        if self.max_keep_ckpts > 0:
            steps = [*(each for each in self.keep_ckpt_ids if each != step), step]
            old = steps[: -self.max_keep_ckpts]
            self.keep_ckpt_ids.clear()
            self.keep_ckpt_ids.extend(steps)
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        stopgap = runner.message_hub.runtime_info.pop(_STOPGAP, None)
        self._last_step = step
        self._write(runner, name, meta, by_epoch=self.by_epoch)
        if not is_main_process():
            return
        folder = Path(self.out_dir)
        for each in old:
            (folder / self.filename_tmpl.format(each)).unlink(missing_ok=True)
        if stopgap is not None and stopgap != name:
            (folder / stopgap).unlink(missing_ok=True)

    def _write(self, runner, name: str, meta: dict, *, by_epoch: bool) -> None:
        """Write a checkpoint aside and rename it when it is complete."""
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
            by_epoch=by_epoch,
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


def write_aside(cfg: Config) -> None:
    """Let a downstream run save with :class:`HostCheckpointHook` in the place of MMEngine's hook.

    Another hook, and folders that are not on a disk, stay as they are.
    """
    hook = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
    if hook.get("type") == "CheckpointHook" and "://" not in str(hook.get("out_dir")):
        hook["type"] = HostCheckpointHook.__name__


# --- Without frozen backbones ---


@HOOKS.register_module()
class FrozenBackboneHook(Hook):
    """Writes checkpoints of the head alone, with a record of the frozen backbone's weights.

    A backbone is left out if none of its parameters train and its weights were loaded whole by
    ``DINOv3Pretrained``. Loading such a checkpoint, by this project or by a host's own tools, loads
    the recorded weights and checks that they are the same. A backbone that trains, or whose weights
    have no source, is saved as usual.

    The record is an entry of ``state_dict``; ``meta['frozen_backbones']`` holds it in plain form.

    Raises:
        RuntimeError: When a checkpoint is written, if a frozen backbone has changed.
    """

    def __init__(self) -> None:
        self._frozen: dict[str, tuple[RecordedWeights, dict]] = {}

    def before_train(self, runner) -> None:
        """Find the frozen backbones and say what becomes of them."""
        model = unwrapped(runner.model)
        for name, module in model.named_modules():
            if not isinstance(module, RecordedWeights):
                continue
            reason = _reason_to_save(module)
            if reason is None:
                self._frozen[name] = (module, make_record(module))
                reason = "checkpoints leave it out and name its weights"
            runner.logger.info(f"{name}: {reason}")

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Replace the tensors of each frozen backbone by their record."""
        for name, (module, record) in self._frozen.items():
            if fingerprint(module) != record["fingerprint"]:
                raise RuntimeError(
                    f"{name} is frozen, but its tensors have changed since training began; "
                    "something writes to them (an EMA, a hook, a load). No checkpoint was written"
                )
            tensors = checkpoint["state_dict"]
            for key in [key for key in tensors if key.startswith(f"{name}.")]:
                del tensors[key]
            tensors[f"{name}.{RECORD}"] = record_to_tensor(record)
            checkpoint["meta"].setdefault("frozen_backbones", {})[name] = record


def _reason_to_save(module: nn.Module) -> str | None:
    """Why checkpoints must hold a backbone, or None if they need not."""
    training = sum(parameter.requires_grad for parameter in module.parameters())
    if training:
        return f"{training} of its tensors train; checkpoints hold all of it"
    if module.weights_origin is None:
        return "frozen, but its weights come from no file; checkpoints hold all of it"
    if module.weights_origin.get("allow_partial"):
        return "frozen, but loaded in part only; checkpoints hold all of it"
    return None
