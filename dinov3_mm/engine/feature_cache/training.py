"""Heads that train from cached features in place of images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from dinov3_mm.datasets.class_names import parts_of
from dinov3_mm.engine.config.coco import settle_objects
from dinov3_mm.errors import ConfigError
from dinov3_mm.features.store import some
from dinov3_mm.models.wrapping import unwrapped

from .compute import (
    DiskError,
    build_data,
    compute_features,
    image_keys,
    place_of,
)
from .store import Call, FeatureStore, map_outputs
from .views import (
    SIZE,
    CachedModel,
    NotCacheableError,
    Views,
    build_cached_model,
    detour,
    drawn_from,
    for_labels,
    frozen_part,
    stamp,
    training_views,
    validation_views,
    without_pipeline,
)

# Draws of another image for one that has no features or, in this view, no labels.
_MAX_DRAWS = 1000


@DATASETS.register_module()
class CachedFeatures(Dataset):
    """Samples of a data set with labels read now, and features computed before.

    See :func:`use_feature_cache`.

    Args:
        dataset: config of the data set, without a pipeline.
        pipelines: steps that give the labels of the first view, and of the others.
        folder: of a complete cache.
        views: names of the views.
        on_pixels: labels lie on the image and go through its steps; else the empty image has the
            size of the model's input.
        training: another image takes the place of one that has none, and views are drawn; else the
            first view is taken.
    """

    def __init__(
        self,
        dataset: dict,
        pipelines: Sequence[Sequence[dict]],
        folder: str,
        views: Sequence[str] = ("0",),
        *,
        on_pixels: bool = True,
        training: bool = True,
    ) -> None:
        self.dataset = DATASETS.build(dataset)
        if hasattr(self.dataset, "full_init"):
            self.dataset.full_init()
        self.pipelines = [Compose(steps) for steps in pipelines]
        for part in parts_of(self.dataset):
            part.label_steps = self.pipelines[0]  # for the check of label and depth maps
        self.views = list(views)
        self.on_pixels = on_pixels
        self.training = training
        self.keys = image_keys(self.dataset, dataset)
        self.store = FeatureStore(folder)
        self.places = [
            [place_of(self.store, key, view) for view in self.views] for key in self.keys
        ]
        wanted = {(key, view) for key in self.keys for view in self.views}
        self.store.places = {key: self.store.places[key] for key in wanted}

    def __getattr__(self, name: str) -> Any:
        # What samplers and metrics ask of a data set: get_data_info, get_cat_ids, metainfo.
        if name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        for _ in range(_MAX_DRAWS):
            view = np.random.randint(len(self.views)) if len(self.views) > 1 else 0
            sample = self._sample(index, view)
            if sample is None and view:
                sample = self._sample(index, 0)
            if sample is not None:
                return sample
            if not self.training:
                raise ConfigError(
                    f"feature cache: {self.keys[index]} has no labels, or its image cannot be read"
                )
            index = np.random.randint(len(self))
        raise ConfigError(f"feature cache: {_MAX_DRAWS} images in a row had no labels")

    def _sample(self, index: int, view: int) -> dict[str, Any] | None:
        """Features of an image in a view, with labels read now; None if it is left out."""
        place = self.places[index][view]
        if place.row < 0:
            return None
        stored = self.store.read(place)
        record = self.dataset[index]
        record[SIZE] = stored.original if self.on_pixels else (*stored.calls[0].size, 1)
        with drawn_from(self.keys[index], view):
            packed = self.pipelines[min(view, len(self.pipelines) - 1)](record)
            drawn = stamp()
        if packed is None:
            return None
        if self.on_pixels and view and drawn != stored.stamp:
            raise ConfigError(
                f"feature cache: with its labels, view {view} of {self.keys[index]} is cut "
                "otherwise than it was computed: a random step looks at the labels. Take "
                "--cache-views 1"
            )
        return {**packed, "features": Features(stored.calls)}


@dataclass(frozen=True)
class Features:
    """Calls of the backbone for an image; no sequence, which a collation would take apart."""

    calls: list[Call]


@HOOKS.register_module()
class CachedFeaturesHook(Hook):
    """Lets a model take features where its backbone would compute them.

    The images of such a batch are empty; they go through the preprocessor, which brings labels and
    sizes in place. A batch of images without features goes through the backbone. Names of
    parameters stay the same.
    """

    def __init__(self) -> None:
        self._rows: list[list[Call]] | None = None
        self._next = 0

    def before_run(self, runner) -> None:
        """Put the two detours in."""
        model = unwrapped(runner.model)
        model.data_preprocessor.forward = self._around_preprocessor(model.data_preprocessor)
        detour(frozen_part(model.backbone), self._around_backbone)

    def _around_preprocessor(self, preprocessor: Any) -> Callable:
        images = preprocessor.forward

        def forward(data: Any, training: bool = False) -> Any:
            self._rows, self._next = None, 0
            if isinstance(data, dict) and "features" in data:
                data = dict(data)
                self._rows = [features.calls for features in data.pop("features")]
            return images(data, training)

        return forward

    def _around_backbone(self, compute: Callable) -> Callable:
        def forward(inputs: Tensor, *args: Any, **options: Any) -> Any:
            if self._rows is None:
                return compute(inputs, *args, **options)
            calls = [row[self._next] for row in self._rows]
            self._next += 1
            # Whatever calls the backbone after the model is done brings its own images.
            if self._next == min(map(len, self._rows)):
                self._rows = None
            return stack_calls(calls, inputs)

        return forward


def stack_calls(calls: Sequence[Call], inputs: Tensor) -> Any:
    """The outputs of a batch, in fp32; maps of smaller images are padded with zeros.

    Args:
        calls: of the images of the batch.
        inputs: what the backbone is given, (B, C, H, W).

    Raises:
        ConfigError: inputs of another size than the features were computed from.
    """
    height, width = inputs.shape[-2:]
    sizes = {call.size for call in calls}
    is_padded = len(sizes) > 1 or sizes != {(height, width)}
    if len(calls) != len(inputs) or any(h > height or w > width for h, w in sizes):
        raise ConfigError(
            f"feature cache: features of {sorted(sizes)} pixels, but the backbone is given a batch "
            f"of {tuple(inputs.shape)}; the model was changed after they were computed"
        )

    def stacked(*leaves: Tensor) -> Tensor:
        if is_padded and leaves[0].dim() != 3:
            raise ConfigError(
                f"feature cache: images of {sorted(sizes)} pixels in one batch; only maps can be "
                "padded. Give the pipeline a fixed size, or the loader batch_size=1"
            )
        if is_padded:
            leaves = tuple(
                _padded(leaf, call.size, (height, width))
                for leaf, call in zip(leaves, calls, strict=True)
            )
        return torch.stack(leaves).to(inputs.device).float()

    return map_outputs(stacked, *(call.outputs for call in calls))


def _padded(leaf: Tensor, size: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """A map (C, h, w) of an image as that of a batch, whose images are larger."""
    rows, columns = (
        -(-wanted * positions // pixels)
        for wanted, positions, pixels in zip(target, leaf.shape[-2:], size)
    )
    return F.pad(leaf, (0, columns - leaf.shape[-1], 0, rows - leaf.shape[-2]))


def use_feature_cache(
    cfg: Config, folder: str, dtype: str = "fp32", *, views: int = 1, content: bool = False
) -> list[str]:
    """Compute the features of a config's data, and let its head train from them.

    Random steps of the training pipeline are replaced, see
    :func:`~dinov3_mm.engine.feature_cache.views.training_views`. The head sees the same samples in
    the same order as without a cache; where the config has no random step it comes out the same to
    rounding (with ``dtype='fp32'``). The validation set is cached too, if the model calls its
    backbone for one image at a time and the disk has room; else it is validated on images.

    Args:
        cfg: config of a host with a frozen backbone; changed in place.
        folder: where the caches of training and validation lie or will lie.
        dtype: 'fp32', or 'bf16' for half the size.
        views: of each training image; the first is that of the evaluation, the others are random
            flips and crops of the config, drawn once.
        content: compare files by a hash of their bytes too.

    Returns:
        Lines for the log.

    Raises:
        ConfigError: see :func:`compute_features`.
    """
    if views < 1:
        raise ConfigError(f"--cache-views is {views}; expected 1 or more")
    settle_objects(cfg, splits=[s for s in ("train", "val") if cfg.get(f"{s}_dataloader")])
    chosen = training_views(cfg)
    cached = build_cached_model(cfg)
    place = Path(folder)
    options = dict(dtype=dtype, content=content)
    lines = [f"cached features: {note}" for note in chosen.notes]
    if chosen.notes and views > 1:
        lines.append(f"cached features: {views} views an image, {views - 1} of them drawn once")
    if views > 1 and not chosen.further:
        lines.append("cached features: one view an image, since the pipeline draws nothing")
    split = "train_dataloader", chosen, views
    lines += _cache(cfg, cached, *split, place / "train", training=True, **options)
    if cfg.get("val_dataloader"):
        try:
            split = "val_dataloader", validation_views(cfg.val_dataloader), 1
            lines += _cache(cfg, cached, *split, place / "val", training=False, **options)
        except (NotCacheableError, DiskError) as error:
            lines.append(f"validation goes through the backbone: {error}")
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), dict(type="CachedFeaturesHook")]
    return lines


def _cache(
    cfg: Config,
    cached: CachedModel,
    name: str,
    views: Views,
    num_views: int,
    folder: Path,
    *,
    training: bool,
    **options: Any,
) -> list[str]:
    """Compute what a loader's images lack, and let the loader read features; lines for the log."""
    loader = cfg[name]
    scope = cfg.get("default_scope", "mmengine")
    data = build_data(loader, views, num_views, training, scope)
    lines = compute_features(cfg, cached, data, loader, folder, **options)
    if training:
        lines += _left_out(folder)
    steps = [views.first, views.further] if data.num_views > 1 else [views.first]
    on_pixels = cached.looks_at_images or scope != "mmpretrain"
    pipelines = [
        for_labels(s, with_image=cached.looks_at_images, on_pixels=on_pixels) for s in steps
    ]
    loader.dataset = dict(
        type="CachedFeatures",
        dataset=without_pipeline(loader.dataset),
        pipelines=pipelines,
        folder=str(folder),
        views=data.names,
        on_pixels=on_pixels,
        training=training,
    )
    loader.collate_fn = dict(type="pseudo_collate")
    return lines


def _left_out(folder: Path) -> list[str]:
    """What is said of images that cannot be read."""
    store = FeatureStore(folder)
    broken = {path: place.reason for (path, _), place in store.places.items() if place.row < 0}
    if not broken:
        return []
    reasons = some(broken.values())
    return [f"WARNING: {len(broken)} training images cannot be read and are replaced: {reasons}"]
