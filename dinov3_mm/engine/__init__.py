"""Training: configs, launch, strategies, the loop, hooks and the optimizer."""

from . import hooks, loops, optim, strategy  # noqa: F401  (registers them)
from .build import build_runner
from .config import ConfigError, apply_options, check_config, parse_options
from .runner import LAUNCHERS, find_latest_checkpoint, start_processes

__all__ = [
    "LAUNCHERS",
    "ConfigError",
    "apply_options",
    "build_runner",
    "check_config",
    "find_latest_checkpoint",
    "parse_options",
    "start_processes",
]
