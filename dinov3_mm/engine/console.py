"""The console at the start of a run: ten lines that matter; pages and notes go to files.

MMEngine prints the environment, the config and the table of hooks, two hundred lines, before the
first message that is about the run. Here they go to the log file alone, and the environment to
``environment.txt`` beside the resolved config, which MMEngine writes under its own name.
"""

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop
from torch import nn

from dinov3_mm.engine.config.check import is_host_config
from dinov3_mm.engine.resume import checkpoint_of
from dinov3_mm.models.wrapping import unwrapped

ENVIRONMENT_FILE = "environment.txt"

# Beginnings of messages that stay in the log file. What MMEngine prints as pages:
_ENVIRONMENT = f"\n{'-' * 60}\nSystem environment:"
_PAGES = (_ENVIRONMENT, "Config:\n", "Hooks will be executed in the following order:")
# Notes of MMEngine and the hosts on themselves, which ask nothing of the user:
_NOTES = (
    "Distributed training is not used, all SyncBatchNorm",
    '"FileClient" will be deprecated in future',
    '"HardDiskBackend" is the alias of "LocalBackend"',
    "Exp name: ",
    "Checkpoints will be saved to ",
    "The prefix is not set in metric class",
    "Reach the end of the dataloader, it will be restarted",
)
# The same among the warnings of Python.
_WARNINGS = (
    "Setting OMP_NUM_THREADS environment variable",
    "Setting MKL_NUM_THREADS environment variable",
)
_WIDTH = 12


class _LogFileOnly(logging.Filter):
    """Keeps pages and notes out of a console; the environment is written to its file."""

    def __init__(self, work_dir: str) -> None:
        super().__init__()
        self._environment = Path(work_dir) / ENVIRONMENT_FILE

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text.startswith(_ENVIRONMENT) and is_main_process():
            self._environment.write_text(text.strip("\n-") + "\n")
        return not text.startswith((*_PAGES, *_NOTES, *_WARNINGS)) and not _is_about_metainfo(text)


def _is_about_metainfo(text: str) -> bool:
    return text.startswith("Dataset ") and "has no metainfo" in text


@contextmanager
def quiet_console(work_dir: str) -> Iterator[None]:
    """Loggers that are made in this context keep their console to what matters.

    A runner makes its logger, and prints its pages, before anybody can get hold of it.
    """
    make = MMLogger.__init__

    def made(logger: MMLogger, *args, **kwargs) -> None:
        make(logger, *args, **kwargs)
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler and handler.stream is sys.stdout:
                handler.addFilter(_LogFileOnly(work_dir))

    MMLogger.__init__ = made
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
    finally:
        MMLogger.__init__ = make
        for each in caught:
            if str(each.message).startswith(_WARNINGS):
                MMLogger.get_current_instance().warning(str(each.message))
            else:
                warnings.showwarning(each.message, each.category, each.filename, each.lineno)


@HOOKS.register_module()
class StartHook(Hook):
    """Says before the first iteration what is about to be trained, on what, from where, how long.

    ``build_runner`` adds it to every run, and ``build_tester`` to every test.

    Args:
        cfg (Config): Completed config of the run.
        checkpoint (str, optional): What is tested.
    """

    priority = "VERY_HIGH"

    def __init__(self, cfg: Config, checkpoint: str | None = None) -> None:
        self.cfg, self.checkpoint = cfg, checkpoint

    def before_train(self, runner) -> None:
        """Log the lines of a training."""
        self._log(runner, start_lines(runner, self.cfg))

    def before_test(self, runner) -> None:
        """Log the lines of a test."""
        self._log(runner, lines_of_a_test(runner, self.cfg, self.checkpoint))

    def _log(self, runner, lines: Iterator[tuple[str, str]]) -> None:
        for name, text in lines:
            runner.logger.info(f"{name:<{_WIDTH}}{text}")


def start_lines(runner, cfg: Config) -> Iterator[tuple[str, str]]:
    """What the run is, line by line: a word and what there is to say about it."""
    model = unwrapped(runner.model)
    of_host = is_host_config(cfg)
    yield "job", f"{_job(model, of_host)}, config {cfg.filename}"
    yield "data", _data(runner.train_dataloader.dataset, "to train on")
    if runner.val_loop is not None:
        yield "", _data(runner.val_loop.dataloader.dataset, "to validate on")
    yield "weights", _weights(cfg)
    yield "model", _parameters(model)
    yield "length", _length(runner, cfg)
    yield "device", _device(model)
    yield "results", f"{runner.work_dir}: log in {Path(runner.log_dir).name}/, {_files(cfg)}"
    yield "to stop", "Ctrl-C saves and ends; the same command with --resume goes on"


def lines_of_a_test(runner, cfg: Config, checkpoint: str | None) -> Iterator[tuple[str, str]]:
    """What is tested, on what, and where the metrics will be."""
    model = unwrapped(runner.model)
    yield "job", f"testing ({type(model).__name__}), config {cfg.filename}"
    yield "data", _data(runner.test_loop.dataloader.dataset, "to test on")
    yield "weights", f"from {checkpoint}" if checkpoint else _weights(cfg)
    yield "device", _device(model)
    yield "results", f"{runner.work_dir}: metrics.json, log in {Path(runner.log_dir).name}/"


def _job(model: nn.Module, of_host: bool) -> str:
    if not of_host:
        return f"pretraining ({type(model).__name__})"
    head = next((h for h in ("decode_head", "bbox_head", "head") if hasattr(model, h)), None)
    part = type(getattr(model, head)).__name__ if head else type(model).__name__
    return f"training a head ({part})" if head else f"training ({part})"


def _data(dataset: Any, what: str) -> str:
    source = getattr(dataset, "source", None)
    described = dataset if source is None else source
    while hasattr(described, "dataset"):  # a wrapper of MMEngine
        described = described.dataset
    place = _place(described)
    where = f" in {place}" if place else ""
    count = len(dataset if source is None else source)
    return f"{count:,} images {what}: {type(described).__name__}{where}"


def _place(dataset: Any) -> str | None:
    """The file or folder that a data set reads."""
    for name in ("root", "folder", "path", "ann_file", "data_root"):
        value = getattr(dataset, name, None)
        if isinstance(value, (str, Path)) and str(value):
            return str(value)
    return None


def _weights(cfg: Config) -> str:
    resumed = checkpoint_of(cfg)
    if resumed is not None:
        return f"goes on with {resumed}"
    loaded = [cfg.load_from] if cfg.get("load_from") else []
    found = list(dict.fromkeys([*loaded, *_checkpoints(cfg.model)]))
    return f"from {', '.join(map(str, found))}" if found else "random, none are loaded"


def _checkpoints(part: Any) -> Iterator[str]:
    """Files that the parts of a model start from."""
    if isinstance(part, Mapping):
        if isinstance(part.get("init_cfg"), Mapping) and part["init_cfg"].get("checkpoint"):
            yield part["init_cfg"]["checkpoint"]
        part = list(part.values())
    if isinstance(part, (list, tuple)):
        for each in part:
            yield from _checkpoints(each)


def _parameters(model: nn.Module) -> str:
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in counts), sum(n for n, is_trained in counts if is_trained)
    return f"{_counted(total)} parameters, {_counted(trained)} of them trained"


def _counted(count: int) -> str:
    if count < 1e4:
        return f"{count}"
    return f"{count / 1e3:.1f} k" if count < 1e6 else f"{count / 1e6:.1f} M"


def _length(runner, cfg: Config) -> str:
    loop, world = runner.train_loop, get_world_size()
    layout = getattr(loop, "layout", None)
    batch = layout.global_batch_size if layout else (cfg.train_dataloader.batch_size or 1) * world
    text = f"{loop.max_iters:,} iterations of {batch} images"
    if isinstance(loop, EpochBasedTrainLoop):
        text = f"{loop.max_epochs} epochs of {len(loop.dataloader):,} iterations of {batch} images"
    return text if not loop.iter else f"{text}; {loop.iter:,} iterations are done"


def _device(model: nn.Module) -> str:
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    world = get_world_size()
    processes = "1 process" if world == 1 else f"{world} processes"
    dtype = getattr(model, "compute_dtype", None)  # a line of its own in downstream runs
    return f"{processes} on {name}" + (f", computing in {dtype}" if dtype else "")


def _files(cfg: Config) -> str:
    name = Path(cfg.filename).name if cfg.filename else "the config"
    return f"config in {name}, {ENVIRONMENT_FILE}"
