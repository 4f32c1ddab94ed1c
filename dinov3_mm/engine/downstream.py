"""Downstream runs: the metrics of a checkpoint, and several heads over one cache of features."""

import copy
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config, ConfigDict
from mmengine.dist import is_distributed, is_main_process
from mmengine.registry import RUNNERS
from torch import nn

from dinov3_mm.checkpoints import atomic_write
from dinov3_mm.checkpoints.frozen import WEIGHTS
from dinov3_mm.checkpoints.run_checkpoint import load_run_checkpoint, read_run_checkpoint
from dinov3_mm.datasets.class_names import ClassNameError, stored_metainfo
from dinov3_mm.engine.config.check import is_host_config
from dinov3_mm.engine.config.coco import settle_objects
from dinov3_mm.engine.config.host import for_cpu_ranks, set_num_outputs, settle_host, settle_loading
from dinov3_mm.engine.hooks.class_check import follow_stored
from dinov3_mm.errors import ConfigError
from dinov3_mm.models.precision import use_compute_dtype
from dinov3_mm.models.wrapping import unwrapped

from .build import build_runner
from .config import apply_options, parse_options
from .console import StartHook, quiet_console

# --- Metrics of a checkpoint ---


METRICS_FILE = "metrics.json"


def build_tester(cfg: Config, checkpoint: str | None, *, weights: str | None = None):
    """Build the runner that tests a model.

    The classes of the test set are matched by name with those that the checkpoint stores.

    Args:
        cfg (Config): a config of a host, changed in place.
        checkpoint (str | None): a training checkpoint; None tests what the config's ``init_cfg``
            load, such as a released backbone and head.
        weights (str | None): file of a frozen backbone that the checkpoint leaves out, if it is not
            where it was.

    Returns:
        Runner: give it to :func:`test`.

    Raises:
        ConfigError: the config is one of pretraining, has no test set, or a file is not there; or
            the test set has other classes than the model was trained on.
    """
    if not is_host_config(cfg):
        raise ConfigError("this config pretrains and has no test set; give one with a head")
    if not cfg.get("test_dataloader"):
        raise ConfigError("this config has no test_dataloader")
    if checkpoint is not None and not Path(checkpoint).expanduser().exists():
        raise ConfigError(f"there is no checkpoint {checkpoint}")
    cfg.launcher = "pytorch" if is_distributed() else "none"
    cfg.load_from, cfg.resume = None, False
    lines = settle_host(cfg) if checkpoint is None else settle_loading(cfg)
    stored = _trained_on(checkpoint)
    classes = tuple(stored.get("classes") or ())
    if checkpoint is not None and not classes and cfg.get("default_scope") == "mmpretrain":
        lines.append(
            f"WARNING: {checkpoint} does not name its classes: those of the test set are taken to "
            "be the same, in the same order"
        )
    lines += set_num_outputs(cfg, classes)
    lines += settle_objects(cfg, splits=("test",), known=classes)
    lines += use_compute_dtype(cfg)
    with quiet_console(cfg.work_dir):
        runner = RUNNERS.build(for_cpu_ranks(cfg))
    runner.register_hook(StartHook(cfg, checkpoint))
    for line in lines:
        runner.logger.info(line)
    load_model_weights(runner.model, checkpoint, weights=weights)
    try:
        follow_stored(runner, runner.test_loop, stored)
    except ClassNameError as error:
        raise ConfigError(str(error)) from error
    return runner


def _trained_on(checkpoint: str | None) -> dict[str, Any]:
    """What a checkpoint says of its training data: names of the outputs and colours, or nothing."""
    if checkpoint is None:
        return {}
    try:
        return stored_metainfo(read_run_checkpoint(Path(checkpoint).expanduser(), mmap=True))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load_model_weights(
    model: nn.Module, checkpoint: str | None, *, weights: str | None = None
) -> dict[str, Any]:
    """Fill a model from a checkpoint, or from what its ``init_cfg`` name.

    Args:
        model: a host's model; a wrapper of DDP or test-time augmentation is looked through.
        checkpoint: see :func:`build_tester`.
        weights: see :func:`build_tester`.

    Returns:
        The checkpoint's ``meta``.
    """
    model = unwrapped(model)
    if checkpoint is None:
        model.init_weights()
        return {}
    if weights is not None:
        os.environ[WEIGHTS] = str(Path(weights).expanduser().absolute())
    return load_run_checkpoint(model, checkpoint)


def use_tta(cfg: Config) -> None:
    """Test with the config's test-time augmentation.

    Raises:
        ConfigError: the config has none.
    """
    missing = [name for name in ("tta_model", "tta_pipeline") if name not in cfg]
    if missing:
        raise ConfigError(f"--tta: this config has no {' and no '.join(missing)}")
    dataset = cfg.test_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict({**cfg.tta_model, "module": cfg.model})


def draw_predictions(cfg: Config, folder: str) -> None:
    """Write a picture of every prediction below ``folder``, with the host's visualization hook.

    Raises:
        ConfigError: the config has no visualization hook or no visualizer.
    """
    hook = (cfg.get("default_hooks") or {}).get("visualization")
    if hook is None or "visualizer" not in cfg:
        raise ConfigError("--show-dir: this config has no visualization hook or no visualizer")
    path = str(Path(folder).expanduser().absolute())
    # The hosts' hooks agree on the interval only.
    hook["interval"] = 1
    if cfg.default_scope == "mmpretrain":
        hook.update(enable=True, out_dir=path)
    else:
        hook["draw"] = True
        if cfg.default_scope == "mmdet":
            hook["test_out_dir"] = path
    cfg.visualizer["save_dir"] = path
    if not cfg.visualizer.get("vis_backends"):
        cfg.visualizer["vis_backends"] = [dict(type="LocalVisBackend")]


def test(runner) -> dict[str, Any]:
    """Run the test, write ``metrics.json`` into the work folder, and return the metrics."""
    metrics = runner.test()
    if is_main_process():
        with atomic_write(Path(runner.work_dir) / METRICS_FILE) as partial:
            partial.write_text(json.dumps(metrics, indent=2, default=float) + "\n")
    return metrics


# --- A sweep over one cache of features ---


RESULTS = "sweep.json"


class Trial(NamedTuple):
    """One training of a sweep.

    Attributes:
        values: what it changed in the config, by dotted path.
        metrics: of the last validation.
        seconds: of training and validation.
    """

    values: dict[str, Any]
    metrics: dict[str, float]
    seconds: float


def parse_grid(words: Sequence[str]) -> dict[str, list]:
    """Read ``path=[a,b,c]`` words; a single value is a list of one.

    Raises:
        ConfigError: no ``=``, or an empty list.
    """
    grid = {}
    for path, values in parse_options(words).items():
        grid[path] = list(values) if isinstance(values, (list, tuple)) else [values]
        if not grid[path]:
            raise ConfigError(f"--grid {path}: no values")
    return grid


def combinations(grid: Mapping[str, Sequence]) -> Iterator[dict[str, Any]]:
    """Every combination of the values; the last path changes fastest."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values))


def sweep(cfg: Config, grid: Mapping[str, Sequence], work_dir: Path) -> Iterator[Trial]:
    """Train once for every combination, each in a folder of its own.

    Finished trials of an earlier call are read back and not repeated.

    Args:
        cfg: a config that validates, by preference on cached features.
        grid: values by dotted path.
        work_dir: folder of the trials.

    Yields:
        A trial as it is done.

    Raises:
        ConfigError: a path that the config does not have, before anything is trained.
    """
    trials = []
    for number, values in enumerate(combinations(grid)):
        trial = copy.deepcopy(cfg)
        apply_options(trial, values)
        trial.work_dir = str(work_dir / f"trial-{number:03d}")
        trial.experiment_name = f"{work_dir.name}-{number:03d}-{time.time_ns()}"
        trials.append((trial, values))
    for trial, values in trials:
        yield _finished(Path(trial.work_dir), values) or _train(trial, values)


def _train(cfg: Config, values: dict[str, Any]) -> Trial:
    start = time.perf_counter()
    runner = build_runner(cfg)
    runner.train()
    scalars = runner.message_hub.log_scalars
    metrics = {
        name.removeprefix("val/"): float(history.current())
        for name, history in scalars.items()
        if name.startswith("val/") and not name.endswith("time")
    }
    trial = Trial(values, metrics, time.perf_counter() - start)
    with atomic_write(Path(cfg.work_dir) / RESULTS) as partial:
        partial.write_text(json.dumps(trial._asdict(), indent=2) + "\n")
    return trial


def _finished(work_dir: Path, values: dict[str, Any]) -> Trial | None:
    path = work_dir / RESULTS
    if not path.is_file():
        return None
    trial = Trial(**json.loads(path.read_text()))
    if trial.values != json.loads(json.dumps(values)):
        raise ConfigError(
            f"{work_dir} holds another trial ({trial.values}); give another --work-dir"
        )
    return trial
