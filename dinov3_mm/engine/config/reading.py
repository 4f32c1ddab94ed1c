"""Config files, also those that inherit from this package's."""

import os

from mmengine.config import Config

from dinov3_mm.engine.config.check import ConfigError

_SCOPE = "dinov3_mm"


def read_config(path: str | os.PathLike) -> Config:
    """Read a config file.

    MMEngine marks what comes from ``_base_ = 'dinov3_mm::...'`` with the scope 'dinov3_mm', where
    it would then look for the modules of mmpretrain, mmseg or mmdet too. The mark is removed: names
    are looked up in the config's ``default_scope``, as without the detour.

    Raises:
        ConfigError: the config imports a package whose host is not installed; the message is that
            of the package, which MMEngine would hide.
        FileNotFoundError: there is no such file.
    """
    try:
        cfg = Config.fromfile(path)
    except ImportError as error:
        raise ConfigError(f"{_first(error)}") from error
    _unmark(cfg._cfg_dict)
    return cfg


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
