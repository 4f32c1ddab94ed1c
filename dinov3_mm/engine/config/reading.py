"""Config files, also those that inherit from this package's."""

import os

from mmengine.config import Config

_SCOPE = "dinov3_mm"


def read_config(path: str | os.PathLike) -> Config:
    """Read a config file.

    MMEngine marks what comes from ``_base_ = 'dinov3_mm::...'`` with the scope 'dinov3_mm', where
    it would then look for the modules of mmpretrain, mmseg or mmdet too. The mark is removed: names
    are looked up in the config's ``default_scope``, as without the detour.
    """
    cfg = Config.fromfile(path)
    _unmark(cfg._cfg_dict)
    return cfg


def _unmark(part: object) -> None:
    if isinstance(part, dict):
        if part.get("_scope_") == _SCOPE:
            del part["_scope_"]
        part = list(part.values())
    if isinstance(part, (list, tuple)):
        for value in part:
            _unmark(value)
