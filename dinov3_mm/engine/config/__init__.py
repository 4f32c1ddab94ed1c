"""Configs: what they may hold, what they need not say, and options from the command line."""

from dinov3_mm.engine.config.check import ConfigError, check_config
from dinov3_mm.engine.config.defaults import fill_defaults
from dinov3_mm.engine.config.options import apply_options, parse_options
from dinov3_mm.engine.config.reading import read_config

__all__ = [
    "ConfigError",
    "apply_options",
    "check_config",
    "fill_defaults",
    "parse_options",
    "read_config",
]
