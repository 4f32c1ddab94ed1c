"""What a feature cache was made from, and whether it may be made at all."""

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from dinov3_mm.checkpoints.fingerprint import fingerprint
from dinov3_mm.engine.config import ConfigError

_TRIES = 8


def check_frozen(backbone: nn.Module, preprocessor: nn.Module) -> None:
    """Refuse features that would change in training.

    Raises:
        ConfigError: a backbone that trains, or images that are mixed after loading.
    """
    training = [name for name, value in backbone.named_parameters() if value.requires_grad]
    if training:
        raise ConfigError(
            f"feature cache: the backbone is not frozen ({len(training)} of its tensors train, "
            f"such as {training[0]}); set frozen_stages to the number of its blocks"
        )
    mixing = getattr(preprocessor, "batch_augments", None)
    if mixing:
        raise ConfigError(
            "feature cache: the preprocessor mixes images (batch_augments); leave them out"
        )


def check_repeatable(dataset: Any, pipeline: list[dict]) -> None:
    """Refuse a pipeline with random augmentation.

    Raises:
        ConfigError: a step that is called random, or samples that differ between two readings.
    """
    named = [step["type"] for step in pipeline if _sounds_random(step)]
    if named:
        raise ConfigError(
            f"feature cache: the training pipeline is random ({', '.join(named)}); features are "
            "computed once, so leave these steps out"
        )
    for index in range(min(_TRIES, len(dataset))):
        first, second = dataset[index]["inputs"], dataset[index]["inputs"]
        if first.shape != second.shape or not torch.equal(first, second):
            raise ConfigError(
                f"feature cache: sample {index} came out differently when it was read twice; a "
                f"step of the training pipeline is random ({[step['type'] for step in pipeline]})"
            )


def _sounds_random(step: Mapping) -> bool:
    name = step["type"].split(".")[-1].lower()
    words = ("random", "distortion", "jitter", "mixup", "mosaic", "cutout", "erasing", "augment")
    return any(word in name for word in words) and step.get("prob", 1) != 0


def origin_of(
    cfg: Config, dataset_cfg: dict, backbone: nn.Module, dtype: str, compute_dtype: str
) -> dict[str, Any]:
    """JSON values on which the content of a cache depends."""
    plain = Config({"dataset": dataset_cfg, "preprocessor": cfg.model.data_preprocessor})
    return {
        "dataset": plain.to_dict()["dataset"],
        "preprocessor": plain.to_dict()["preprocessor"],
        "backbone": {
            "fingerprint": fingerprint(backbone),
            "out_indices": list(getattr(backbone, "out_indices", ())),
            "out_type": getattr(backbone, "out_type", None),
            "final_norm": getattr(backbone, "final_norm", None),
        },
        "dtype": dtype,
        "compute_dtype": compute_dtype,
    }


def differences(origin: Mapping, other: Mapping, prefix: str = "") -> list[str]:
    """Dotted names of the values in which two origins differ."""
    found = []
    for name in sorted({*origin, *other}):
        mine, theirs = origin.get(name), other.get(name)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found += differences(mine, theirs, f"{prefix}{name}.")
        elif mine != theirs:
            found.append(f"{prefix}{name}")
    return found
