"""A resumed run: what a checkpoint keeps for it, what it says, and the schedules of this config."""

import itertools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop

from dinov3_mm.engine.config.check import is_host_config
from dinov3_mm.engine.resume import (
    RUN,
    Difference,
    checkpoint_of,
    compare_configs,
    compare_schedules,
    identify_samples,
    is_length,
    progress,
    record_run,
    saved_checkpoints,
    unit_of,
)
from dinov3_mm.engine.training_state import refuse_mismatch
from dinov3_mm.errors import ConfigError
from dinov3_mm.models.wrapping import unwrapped

# State of MMEngine's schedulers that moves, beside what the config says.
_MOVING = frozenset({"last_step", "_global_step", "_last_value", "verbose"})


@HOOKS.register_module()
class ResumeHook(Hook):
    """Keeps config and data in checkpoints; says and settles what is different in a resumed run.

    The checkpoint gives weights, moments and iteration, the config everything else; see
    :mod:`dinov3_mm.engine.resume`. MMEngine's runner would take the optimizer's settings and the
    state of the schedulers from the checkpoint too: where they are not those of the config, this
    hook builds the schedules of the config and moves them to the iteration.

    ``build_runner`` adds it to every run.

    Args:
        cfg (Config): Completed config of the run.
        meta (dict, optional): Meta data of the checkpoint that is resumed.
    """

    priority = "VERY_HIGH"

    def __init__(self, cfg: Config, meta: Mapping[str, Any] | None = None) -> None:
        self.cfg = cfg
        self.meta = meta
        self.of_host = is_host_config(cfg)
        self._samples: dict[str, Any] = {}
        self._stored_rate: float | None = None
        self._moves_schedules = False

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Of a downstream run: refuse another model, and give the optimizer the config's settings.

        Raises:
            ConfigError: tensors or parameter groups that are not the model's.
        """
        if self.meta is None:
            return
        # MMEngine would run it as a Python file.
        checkpoint["meta"].pop("config", None)
        if not self.of_host:
            return
        self._refuse_other_model(runner, checkpoint)
        if "optimizer" in checkpoint and not isinstance(runner.optim_wrapper, OptimWrapperDict):
            self._settle_optimizer(runner, checkpoint)

    def before_train(self, runner) -> None:
        """Name the samples; of a resumed run move the schedules and say what is different."""
        if is_main_process():
            self._samples = identify_samples(runner.train_dataloader.dataset)
        if self.meta is None:
            return
        if self.of_host:
            _keep_files_here(runner)
            _skip_done_batches(runner)
        if self._moves_schedules:
            _move_schedules(runner)
        if is_main_process():
            self._report(runner)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Keep what a later run compares itself with."""
        checkpoint["meta"][RUN] = record_run(
            self.cfg, {**self._samples, "epoch_length": _epoch_length(runner)}
        )

    def _refuse_other_model(self, runner, checkpoint: dict) -> None:
        model = unwrapped(runner.model)
        # A frozen backbone is in the checkpoint by name only, see FrozenBackboneHook.
        left_out = tuple(f"{name}." for name in checkpoint["meta"].get("frozen_backbones", ()))
        own, stored = (
            {name: value for name, value in state.items() if not name.startswith(left_out)}
            for state in (model.state_dict(), checkpoint["state_dict"])
        )
        misshapen = [
            f"{name} (checkpoint {tuple(stored[name].shape)}, model {tuple(own[name].shape)})"
            for name in own.keys() & stored.keys()
            if getattr(own[name], "shape", None) != getattr(stored[name], "shape", None)
        ]
        try:
            refuse_mismatch(own.keys() - stored.keys(), stored.keys() - own.keys(), misshapen)
        except ValueError as error:
            raise ConfigError(
                f"--resume: {error}. Keep the model, or start a new run from these weights with "
                f"--cfg-options load_from={checkpoint_of(self.cfg)} and no --resume"
            ) from None

    def _settle_optimizer(self, runner, checkpoint: dict) -> None:
        wrapper, stored = runner.optim_wrapper, checkpoint["optimizer"]
        own, old = wrapper.optimizer.state_dict()["param_groups"], stored["param_groups"]
        if [len(group["params"]) for group in own] != [len(group["params"]) for group in old]:
            raise ConfigError(
                f"--resume: the optimizer of {checkpoint_of(self.cfg)} has {len(old)} group(s) of "
                f"parameters, that of this config {len(own)}, or of other sizes: keep what trains "
                "and optim_wrapper.paramwise_cfg, or start a new run from its weights with "
                f"--cfg-options load_from={checkpoint_of(self.cfg)} and no --resume"
            )
        self._stored_rate = max(group["lr"] for group in old)
        is_elsewhere = _count_epochs_anew(runner, checkpoint["meta"])
        schedulers = runner.param_schedulers or []
        states = checkpoint.get("param_schedulers") or []
        if any(getattr(scheduler, "need_val_args", False) for scheduler in schedulers):
            return  # they follow the scores, which are in the checkpoint alone
        moving = {scheduler.param_name for scheduler in schedulers}
        moving |= {"betas"} if "momentum" in moving else set()
        is_same = _settings(own, moving) == _settings(old, moving)
        if is_same and not is_elsewhere and _same_schedules(schedulers, states):
            return
        self._moves_schedules = True
        checkpoint.pop("param_schedulers", None)
        stored.pop("base_param_settings", None)
        stored["param_groups"] = own

    def _report(self, runner) -> None:
        """Say where the run goes on and what is different."""
        say, warn = runner.logger.info, runner.logger.warning
        done, total, key = progress(self.cfg, self.meta)
        unit, path = unit_of(key), checkpoint_of(self.cfg)
        say(
            f"resume: {done} of {total} {unit} are done. Weights, moments of the optimizer and the "
            f"iteration are those of {path}; rates, loss weights and lengths those of the config"
        )
        _, passed_over = saved_checkpoints(self.cfg)
        if passed_over and path.parent == passed_over[0].parent:
            names = ", ".join(each.name for each in passed_over)
            warn(
                f"resume: {names} passed over: left half-written by a killed run, or by one that "
                "went back to an earlier checkpoint"
            )
        if done == total:
            say(
                f"resume: complete, {done} of {total} {unit}: nothing to train. For more: "
                f"--cfg-options {key}=N"
            )
            return
        is_own = Path(self.cfg.work_dir).resolve() in path.resolve().parents
        if "stage" in self.cfg and not is_own:
            return  # goes on from another stage's checkpoint; what differs is its purpose
        found = compare_configs(self.cfg, self.meta)
        if found is None:
            warn(
                f"resume: {path} does not keep the config and data of its run (an older version "
                "wrote it): what is different now cannot be told"
            )
            if self.of_host:
                self._report_jumps(runner, self._compare_rates(runner)[0])
            return
        self._report_differences(runner, found)

    def _report_differences(self, runner, found: list[Difference]) -> None:
        say, warn = runner.logger.info, runner.logger.warning
        reasons, rounding = [], []
        jumps, follows_length = self._compare_rates(runner)
        for path, old, new, effect in found:
            if is_length(path) and not follows_length:
                effect = "length"
            note = {
                "length": ", the schedules stay what they were",
                "none": ", without effect on what is learnt",
                "place": ", the names of the images are compared",
                "rounding": ", the same to rounding",
                "exactness": ", the config counts",
            }[effect]
            say(f"resume: {path}: {old} -> {new}{note}")
            reasons += [path] if effect == "exactness" else []
            rounding += [path] if effect == "rounding" else []
        self._report_jumps(runner, jumps)
        reasons = reasons or list(jumps)
        reasons += self._compare_data(runner)
        stored, world = self.meta[RUN]["world_size"], get_world_size()
        if stored != world:
            say(f"resume: processes: {stored} -> {world}{self._processes_in_words(stored, world)}")
            (reasons if self.of_host else rounding).append("processes")
        version = str(torch.__version__)
        if version != self.meta[RUN]["torch"]:
            say(f"resume: torch: {self.meta[RUN]['torch']} -> {version}, the same to rounding")
            rounding.append("torch")
        if reasons:
            warn(
                "resume: from here on this is not the run that it would have been, because of: "
                + ", ".join(reasons)
            )
        elif rounding:
            say(f"resume: goes on as if never interrupted, to rounding ({', '.join(rounding)})")
        else:
            # MMEngine's pipelines draw from running generators, which start anew with a process.
            but = "; random augmentations are drawn anew" if self.of_host else ""
            say(f"resume: config, seed and data are the same: goes on as if never interrupted{but}")

    def _report_jumps(self, runner, jumps: dict[str, tuple[float, float]]) -> None:
        for name, (old, new) in jumps.items():
            if name.endswith(".lr"):
                name = f"learning rate ({name})"
            runner.logger.warning(
                f"resume: {name} jumps at iteration {runner.iter} from {old:.4g} to {new:.4g}: the "
                "schedule is that of the config"
            )

    def _compare_rates(self, runner) -> tuple[dict[str, tuple[float, float]], bool]:
        """Values that jump, and whether schedules are others than they were."""
        if not self.of_host:
            return compare_schedules(self.cfg, self.meta, runner.iter)
        if self._stored_rate is None:
            return {}, False
        now = max(group["lr"] for group in runner.optim_wrapper.optimizer.param_groups)
        jumps = {"learning rate": (self._stored_rate, now)} if now != self._stored_rate else {}
        return jumps, self._moves_schedules

    def _compare_data(self, runner) -> list[str]:
        before = self.meta[RUN]
        count, old_count = self._samples["num_samples"], before["num_samples"]
        names, old_names = self._samples["samples"], before["samples"]
        if count != old_count:
            runner.logger.warning(
                f"resume: images: {old_count} -> {count}, which puts all of them into another order"
            )
        elif None not in (names, old_names) and names != old_names:
            runner.logger.warning(
                f"resume: images: {count} as before, but with other names or labels, or in another "
                "order"
            )
        else:
            return []
        return ["images"]

    def _processes_in_words(self, stored: int, world: int) -> str:
        if not self.of_host:
            return (
                ": the same images, crops and masks; stochastic depth and RoPE augmentation are "
                "drawn by each process"
            )
        size = self.cfg.train_dataloader.get("batch_size", 1)
        return (
            f": a step sees {size * world} images where it saw {size * stored}; set "
            "train_dataloader.batch_size to keep their number"
        )


def _settings(groups: list[dict], moving: set[str]) -> list[dict]:
    """What the config sets in the groups of an optimizer."""
    hidden = {"params", *moving}
    return [{key: value for key, value in group.items() if key not in hidden} for group in groups]


def _same_schedules(schedulers: list, states: list[dict]) -> bool:
    """Whether the schedulers of a checkpoint were built as those of this run are."""
    own = [scheduler.state_dict() for scheduler in schedulers]
    fixed = [
        [{key: value for key, value in state.items() if key not in _MOVING} for state in each]
        for each in (own, states)
    ]
    return fixed[0] == fixed[1]


def _count_epochs_anew(runner, meta: dict) -> bool:
    """As many epochs are another number of iterations where batch or data are others."""
    length, before = _epoch_length(runner), (meta.get(RUN) or {}).get("epoch_length")
    if not length or not before or length == before or meta["iter"] // before != meta["epoch"]:
        return False
    # An epoch that was left in its middle begins anew: its images have another order now.
    meta["iter"] = meta["epoch"] * length
    runner.logger.info(
        f"resume: an epoch has {length} iterations, it had {before}: {meta['epoch']} epochs count "
        f"as {meta['iter']} iterations"
    )
    return True


class _FirstTimeFrom:
    """A batch sampler whose first pass begins after some batches; nothing of them is read."""

    def __init__(self, batches, start: int) -> None:
        self._batches, self._start = batches, start

    def __iter__(self) -> Iterator:
        start, self._start = self._start, 0
        return itertools.islice(iter(self._batches), start, None)

    def __len__(self) -> int:
        return len(self._batches)

    def __getattr__(self, name: str):
        return getattr(self._batches, name)


def _skip_done_batches(runner) -> None:
    """Go on within an epoch that Ctrl-C or a signal left in its middle."""
    length = _epoch_length(runner)
    done = runner.iter - runner.epoch * length
    if not length or not 0 < done <= length:
        return
    loader = runner.train_dataloader
    # torch refuses to set it, though it reads it anew for each pass.
    vars(loader)["batch_sampler"] = _FirstTimeFrom(loader.batch_sampler, done)
    runner.logger.info(
        f"resume: {done} of {length} iterations of epoch {runner.epoch + 1} are done"
    )


def _epoch_length(runner) -> int:
    """Iterations of an epoch; 0 where a run does not count epochs."""
    counts_epochs = isinstance(runner.train_loop, EpochBasedTrainLoop)
    return len(runner.train_dataloader) if counts_epochs else 0


def _move_schedules(runner) -> None:
    """Bring fresh schedulers to the runner's iteration.

    MMEngine's schedules are recursions, so they are run through.
    """
    schedulers = runner.param_schedulers or []
    length = _epoch_length(runner)
    with warnings.catch_warnings():
        # The optimizer made these steps in an earlier process.
        warnings.filterwarnings("ignore", message="Detected call of `scheduler.step")
        for iteration in range(1, runner.iter + 1):
            ends_epoch = length and iteration % length == 0
            for scheduler in schedulers:
                if not scheduler.by_epoch or ends_epoch:
                    scheduler.step()


def _keep_files_here(runner) -> None:
    """Let paths that MMEngine stored mean the files of this work folder.

    They are those of the folder in which the run began, whose files it would delete.
    """
    info = runner.message_hub.runtime_info
    hook = (runner.cfg.get("default_hooks") or {}).get("checkpoint") or {}
    folder = Path(runner.work_dir)
    if hook.get("out_dir"):
        folder = Path(hook["out_dir"]) / folder.name
    for key, value in list(info.items()):
        if isinstance(value, str) and (key == "last_ckpt" or key.startswith("best_ckpt")):
            runner.message_hub.update_info(key, str(folder / Path(value).name))
