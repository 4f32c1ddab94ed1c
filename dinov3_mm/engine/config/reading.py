"""Config files, also those that inherit from this package's."""

import os
import traceback
from pathlib import Path

import mmengine
from mmengine.config import Config
from mmengine.config.utils import ConfigParsingError

from dinov3_mm.engine.config.check import ConfigError

_SCOPE = "dinov3_mm"
# What running a config can raise.
_OF_PYTHON = (
    *(ArithmeticError, AttributeError, LookupError, NameError, SyntaxError, TypeError),
    ConfigParsingError,
)
# What running a config can raise.
_OF_PYTHON = (ArithmeticError, AttributeError, LookupError, NameError, SyntaxError, TypeError)


def read_config(path: str | os.PathLike) -> Config:
    """Read a config file.

    MMEngine marks what comes from ``_base_ = 'dinov3_mm::...'`` with the scope 'dinov3_mm', where
    it would then look for the modules of mmpretrain, mmseg or mmdet too. The mark is removed: names
    are looked up in the config's ``default_scope``, as without the detour.

    Raises:
        ConfigError: the config imports a package whose host is not installed; the message is that
            of the package, which MMEngine would hide. Or it is no valid Python.
        FileNotFoundError: there is no such file.
    """
    try:
        cfg = Config.fromfile(path)
    except ImportError as error:
        raise ConfigError(f"{_first(error)}") from error
    except _OF_PYTHON as error:
        raise ConfigError(f"the config cannot be read: {_in_words(error)}") from error
    _unmark(cfg._cfg_dict)
    return cfg


def _in_words(error: Exception) -> str:
    """What is wrong in a config, and where, in it or in one that it inherits from."""
    text = f"{type(error).__name__}: {error.args[0] if error.args else error}"
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {text}"
    steps = traceback.extract_tb(error.__traceback__)
    mmengine_from = next(i for i, step in enumerate(steps) if _is_of_mmengine(step.filename))
    inside = [step for step in steps[mmengine_from:] if step.name == "<module>"]
    return f"{inside[-1].filename}, line {inside[-1].lineno}: {text}" if inside else text


def _is_of_mmengine(path: str) -> bool:
    return Path(mmengine.__file__).parent in Path(path).parents


def _first(error: BaseException) -> BaseException:
    """The error with which it all began."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _unmark(part: object) -> None:
    if isinstance(part, dict):
        if part.get("_scope_") == _SCOPE:
            del part["_scope_"]
        part = list(part.values())
    if isinstance(part, (list, tuple)):
        for value in part:
            _unmark(value)
