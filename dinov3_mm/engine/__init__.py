"""Training: configs, launch, strategies, the loop, hooks and the optimizer.

Modules imported for their effect register what configs name.
"""

from dinov3_mm.engine.config.from_stage import resume_stage, start_from_stage
from dinov3_mm.engine.config.read import set_data, set_teacher, set_weights

from . import feature_cache, hooks, loop, optim  # noqa: F401
from .build import build_runner
from .config import ConfigError, apply_options, check_config, parse_options, read_config
from .launch import LAUNCHERS, end_processes, run_training, start_processes
from .resume import set_resume
from .run_files import find_latest_checkpoint
from .strategies import ddp, fsdp2, students  # noqa: F401

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
