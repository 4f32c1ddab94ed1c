"""Configs: what they may hold, what they need not say, and options from the command line."""

from dinov3_mm.errors import ConfigError

from .check import check_config, fill_defaults
from .read import apply_options, parse_options, read_config

__all__ = [
    "ConfigError",
    "apply_options",
    "check_config",
    "fill_defaults",
    "parse_options",
    "read_config",
]
