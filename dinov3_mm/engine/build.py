"""From a config to a runner that is ready to train."""

import copy
from collections.abc import Sequence

import torch
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, get_rank, get_world_size, is_distributed
from mmengine.registry import MODELS, RUNNERS

from dinov3_mm.engine.config.auto import RECORD, DataFacts, resolve_auto
from dinov3_mm.engine.config.check import is_host_config
from dinov3_mm.engine.config.coco import settle_objects
from dinov3_mm.engine.config.from_stage import refuse_orphan
from dinov3_mm.engine.config.host import for_cpu_ranks, is_classifier, settle_host
from dinov3_mm.engine.config.read import settle_data, settle_teacher, settle_weights
from dinov3_mm.engine.console import StartHook, quiet_console
from dinov3_mm.engine.hooks import ClassCheckHook, ScheduleCheckHook
from dinov3_mm.engine.hooks.downstream_checkpoint import write_aside
from dinov3_mm.engine.hooks.resume import ResumeHook
from dinov3_mm.engine.resume import read_resumed, refuse_resumed
from dinov3_mm.errors import ConfigError
from dinov3_mm.models.precision import use_compute_dtype

from .config import check_config, fill_defaults


def build_runner(cfg: Config, *, notes: Sequence[str] = ()):
    """Check a config, complete it and build its runner.

    Where a process group exists the run is distributed.

    Args:
        cfg (Config): A training config, changed in place. A pretraining config
            (``runner_type='FlexibleRunner'``) is checked and completed with this package's default
            hooks and strategy, and its values ``'auto'`` are derived; any other goes to MMEngine's
            runner after a check of the backbone's weights.
        notes (Sequence[str]): Lines to log first.

    Returns:
        FlexibleRunner | Runner: ``.train()`` trains.

    Raises:
        ConfigError: If a pretraining config holds a name, type or argument that nobody reads, names
            neither images nor weights where it needs them, or describes no possible model; a later
            stage that says nowhere where it starts.
    """
    # The runner would guess from the environment; the process group is there or it is not.
    cfg.launcher = "pytorch" if is_distributed() else "none"
    if is_host_config(cfg):
        meta = read_resumed(cfg)
        lines = [
            *settle_host(cfg),
            *settle_objects(cfg, splits=("train", "val")),
            *use_compute_dtype(cfg),
        ]
        write_aside(cfg)
    else:
        fill_defaults(cfg)
        check_config(cfg, world_size=get_world_size())
        settle_data(cfg)
        meta = read_resumed(cfg)
        refuse_orphan(cfg)
        stored = (meta or {}).get(RECORD)
        lines = [*settle_weights(cfg, stored), *settle_teacher(cfg), *_derive(cfg, stored)]
        check_config(cfg, world_size=get_world_size())
        _check_model(cfg)
    if meta is not None:
        refuse_resumed(cfg, meta)
    with quiet_console(cfg.work_dir):
        runner = RUNNERS.build(for_cpu_ranks(cfg))
    runner.register_hook(StartHook(cfg))
    runner.register_hook(ResumeHook(copy.deepcopy(cfg), meta))
    if is_host_config(cfg):
        runner.register_hook(ScheduleCheckHook())
        has_classes = is_classifier(cfg) or cfg.get("default_scope") == "mmseg"
        if has_classes and not any(isinstance(hook, ClassCheckHook) for hook in runner.hooks):
            runner.register_hook(ClassCheckHook(strict=False))
    for line in (*notes, *lines):
        runner.logger.info(line)
    return runner


def _derive(cfg: Config, stored: dict | None) -> list[str]:
    """Settle the values 'auto': on the first process, for all of them."""
    answer: list = [None]
    if get_rank() == 0:
        try:
            lines = resolve_auto(cfg, world_size=get_world_size(), stored=stored)
            answer = [(lines, cfg[RECORD].to_dict() if RECORD in cfg else {}, None)]
        except ConfigError as error:
            answer = [([], {}, str(error))]
    broadcast_object_list(answer)
    lines, record, error = answer[0]
    if error is not None:
        raise ConfigError(error)
    if "values" in record and get_rank() != 0:
        every = next((v for path, v in record["values"].items() if path.endswith(".every")), None)
        resolve_auto(cfg, stored=record, data=DataFacts(record["num_images"], 0, every))
    return lines


def _check_model(cfg: Config) -> None:
    """Build the model without storage: its own refusals come before the data is touched."""
    try:
        with torch.device("meta"):
            MODELS.build(copy.deepcopy(cfg.model))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from error
