"""Several heads or learning rates over one cache of features."""

import copy
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config

from dinov3_mm.checkpoints import atomic_write
from dinov3_mm.engine.build import build_runner
from dinov3_mm.engine.config import ConfigError, apply_options, parse_options

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
