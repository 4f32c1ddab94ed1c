"""The backbone behind an extractor: from a name, a weight file or a module, with its statistics."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov3_mm.checkpoints import Statistics, build_backbone, read_statistics
from dinov3_mm.checkpoints.fingerprint import fingerprint
from dinov3_mm.checkpoints.released import released_file
from dinov3_mm.models.backbones.zoo import ZooRow, zoo_row


@dataclass(frozen=True)
class OpenedBackbone:
    """A backbone and what is known about it.

    Attributes:
        module: in eval mode unless it was given as a module.
        statistics: input normalisation, None if nothing states it.
        origin: where the weights come from, in words.
    """

    module: nn.Module
    statistics: Statistics | None
    origin: str


def open_backbone(
    model: str | os.PathLike | nn.Module,
    weights: str | os.PathLike | None = None,
    *,
    random_init: bool = False,
) -> OpenedBackbone:
    """Find or build the backbone.

    Args:
        model: a name of ``list_backbones()``, a weight file, folder, URL or hub name, or a module.
        weights: weights for a name; None takes the official file from torch hub's cache.
        random_init: for a name, leave its weights random (seed 0): a baseline.

    Raises:
        FileNotFoundError: If there are no such weights.
        ValueError: If the name is unknown, or the arguments exclude each other.
    """
    row = zoo_row(model) if isinstance(model, (str, os.PathLike)) else None
    if row is None and (weights is not None or random_init):
        raise ValueError(
            "weights and random_init belong to the name of an architecture; got "
            f"{model if not isinstance(model, nn.Module) else 'a module'!r}, which has its weights"
        )
    if isinstance(model, nn.Module):
        return OpenedBackbone(model, None, "a module")
    if row is None:
        # The module first: its errors say more about a file that is none.
        return OpenedBackbone(build_backbone(model), _statistics(model), str(model))
    of_row = Statistics(row.mean, row.std, row.data or "custom")
    if random_init:
        if weights is not None:
            raise ValueError(f"random_init=True leaves no use for weights={weights!r}")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return OpenedBackbone(build_backbone(model), of_row, f"{model}, random weights")
    weights = weights or _released(row)
    module = build_backbone(model, weights)
    return OpenedBackbone(module, _statistics(weights) or of_row, str(weights))


def describe(module: nn.Module, origin: str) -> dict[str, Any]:
    """Provenance of features as JSON: class, architecture, origin and a hash of the weights."""
    return {
        "backbone": type(module).__name__,
        "arch": getattr(module, "arch_settings", {}),
        "weights": origin,
        "fingerprint": fingerprint(module),
    }


def _statistics(weights: str | os.PathLike) -> Statistics | None:
    try:
        return read_statistics(weights)
    except ValueError:  # nothing states them
        return None


def _released(row: ZooRow) -> Path:
    try:
        return released_file(row)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(
            f"{error}. random_init=True gives the features of random weights, a baseline"
        ) from error
