"""Exports of networks of other libraries, built again from what their header says."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS

from ..models.backbones.feature_map import FeatureMapBackbone
from .opening import open_checkpoint
from .safetensors_file import read_export_header


def build_adapter(
    path: str | os.PathLike, overrides: Mapping[str, Any] | None = None
) -> BaseModule | None:
    """The backbone of an export of ``TimmBackbone`` or ``FeatureMapBackbone``, in eval mode.

    Args:
        path: weight file, or folder of several.
        overrides: arguments to change, of which such a backbone takes none.

    Returns:
        None for any other file.

    Raises:
        ImportError: the library of the network is not installed.
        TypeError: overrides were given.
        ValueError: the tensors are not the network's.
    """
    path = Path(path).expanduser()
    header = read_export_header(path)
    adapter = MODELS.get(header["backbone"]) if header else None
    if adapter is None or not issubclass(adapter, FeatureMapBackbone):
        return None
    if overrides:
        raise TypeError(f"{path} is a {header['backbone']}, whose arguments cannot be changed")
    backbone = adapter(**header["arch"])
    opened = open_checkpoint(path)
    try:
        backbone.foreign_module.load_state_dict(opened.read(opened.names), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the network that it names: {error}") from None
    return backbone.eval()
