"""Heads that train from cached features in place of images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import DATASETS, HOOKS
from torch import Tensor
from torch.utils.data import Dataset

from .compute import UnequalSizesError, compute_cache
from .store import FeatureStore


@DATASETS.register_module()
class CachedFeatures(Dataset):
    """Samples whose ``inputs`` are features; see :func:`use_feature_cache`.

    Args:
        folder: of a complete cache.
        metainfo: of the data set that it was made from: class names and colours.
    """

    def __init__(self, folder: str, metainfo: dict | None = None) -> None:
        self.store = FeatureStore(folder)
        # Plain containers: checkpoints keep them, and are read without unpickling.
        plain = metainfo.to_dict() if isinstance(metainfo, ConfigDict) else metainfo
        self.metainfo = plain or {}

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.store[int(index)]
        return {**sample, "inputs": Features(sample["inputs"])}


@dataclass(frozen=True)
class Features:
    """Outputs of a backbone for a sample or a batch, where images are expected."""

    outputs: tuple


@HOOKS.register_module()
class CachedFeaturesHook(Hook):
    """Lets a model take features where images are expected.

    A batch of features goes around the preprocessor and the backbone; a batch of images, as in the
    validation of a segmentor, through both. Names of parameters stay the same.
    """

    def before_run(self, runner) -> None:
        """Put the two detours in."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model.data_preprocessor.forward = _around_preprocessor(model.data_preprocessor)
        model.backbone.forward = _around_backbone(model.backbone.forward)


def use_feature_cache(cfg: Config, folder: str, dtype: str = "fp32") -> list[str]:
    """Compute the features of a config's training set, and let its head train from them.

    The head sees the same samples in the same order as without a cache, so it comes out the same to
    rounding (with ``dtype='fp32'``). The validation set of a classifier is cached too, if its
    images have one size; other models validate on images.

    Args:
        cfg: config of a host with a frozen backbone and no random augmentation; changed in place.
        folder: where the caches of training and validation lie or will lie.
        dtype: 'fp32', or 'bf16' for half the size.

    Returns:
        Lines for the log.

    Raises:
        ConfigError: see :func:`compute_cache`.
    """
    lines = _cache(cfg, "train_dataloader", Path(folder) / "train", training=True, dtype=dtype)
    # Segmentors and detectors use the size and the windows of images in prediction.
    if cfg.get("val_dataloader") and cfg.get("default_scope") == "mmpretrain":
        try:
            place = Path(folder) / "val"
            lines += _cache(cfg, "val_dataloader", place, training=False, dtype=dtype)
        except UnequalSizesError as error:
            lines.append(f"validation goes through the backbone: {error}")
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), dict(type="CachedFeaturesHook")]
    return lines


def _cache(cfg: Config, loader: str, folder: Path, *, training: bool, dtype: str) -> list[str]:
    lines, metainfo = compute_cache(cfg, cfg[loader], folder, training=training, dtype=dtype)
    cfg[loader].dataset = dict(type="CachedFeatures", folder=str(folder), metainfo=metainfo)
    cfg[loader].collate_fn = dict(type="pseudo_collate")
    return lines


def _around_preprocessor(preprocessor: Any) -> Callable:
    images = preprocessor.forward

    def forward(data: dict, training: bool = False) -> dict:
        if not isinstance(data["inputs"][0], Features):
            return images(data, training)
        batch = _stacked([sample.outputs for sample in data["inputs"]])
        samples = preprocessor.cast_data(data["data_samples"])
        return {"inputs": Features(preprocessor.cast_data(batch)), "data_samples": samples}

    return forward


def _stacked(samples: list) -> Any:
    if isinstance(samples[0], Tensor):
        return torch.stack(samples).float()
    return tuple(_stacked(list(parts)) for parts in zip(*samples, strict=True))


def _around_backbone(images: Callable) -> Callable:
    def forward(inputs: Any) -> Any:
        return inputs.outputs if isinstance(inputs, Features) else images(inputs)

    return forward
