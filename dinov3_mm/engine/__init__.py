"""Training: configs, launch, strategies, the loop, hooks and the optimizer."""

# These register what configs name.
from . import feature_cache, fsdp2, hooks, loops, optim, strategy, students  # noqa: F401
from .build import build_runner
from .config import ConfigError, apply_options, check_config, parse_options, read_config
from .resume import set_resume
from .runner import (
    LAUNCHERS,
    end_processes,
    find_latest_checkpoint,
    run_training,
    start_processes,
)
from .stages import resume_stage, start_from_stage
from .starting_point import set_data, set_teacher, set_weights

__all__ = [
    "LAUNCHERS",
    "ConfigError",
    "apply_options",
    "build_runner",
    "check_config",
    "end_processes",
    "find_latest_checkpoint",
    "parse_options",
    "read_config",
    "resume_stage",
    "run_training",
    "set_data",
    "set_resume",
    "set_teacher",
    "set_weights",
    "start_from_stage",
    "start_processes",
]
