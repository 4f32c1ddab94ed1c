"""From a downstream config and a checkpoint to the metrics of its test set."""

import json
import os
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.dist import is_distributed, is_main_process
from mmengine.registry import RUNNERS
from torch import nn

from dinov3_mm.checkpoints import atomic_write
from dinov3_mm.checkpoints.run_checkpoint import load_run_checkpoint, read_run_checkpoint
from dinov3_mm.checkpoints.weights_record import WEIGHTS
from dinov3_mm.datasets.class_names import ClassNameError, stored_metainfo
from dinov3_mm.engine.coco_config import settle_objects
from dinov3_mm.engine.config import ConfigError
from dinov3_mm.engine.console import StartHook, quiet_console
from dinov3_mm.engine.hooks.class_check import follow_stored
from dinov3_mm.engine.host_config import (
    for_cpu_ranks,
    is_host_config,
    set_num_outputs,
    settle_host,
    settle_loading,
)
from dinov3_mm.engine.precision import use_compute_dtype

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
    while hasattr(model, "module"):
        model = model.module
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
