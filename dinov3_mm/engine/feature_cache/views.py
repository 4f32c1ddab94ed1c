"""What of a frozen model is cached, and of which views of an image."""

import copy
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope
from torch import Tensor, nn

from dinov3_mm.datasets.transforms.host_steps import ORIENTATION
from dinov3_mm.errors import ConfigError
from dinov3_mm.models.precision import DTYPES, asked_dtype, autocast_parts, choose_dtype

# --- The frozen part of a model: what it is, and what passes through it ---


# Ways into a backbone that our models take.
_ENTRIES = ("forward", "get_intermediate_layers")


class NotCacheableError(ConfigError):
    """What a model does with its backbone cannot be stored."""


@dataclass
class CachedModel:
    """A model whose backbone, or the part of it that is frozen, is computed once.

    Attributes:
        model: on its device, in evaluation mode.
        frozen: the module whose outputs are stored.
        looks_at_images: something of the backbone trains and needs the image, as an adapter does.
        asked, computed: the dtype of the config, and the one that it means here.
    """

    model: nn.Module
    frozen: nn.Module
    looks_at_images: bool
    asked: str
    computed: str

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def build_cached_model(cfg: Config) -> CachedModel:
    """Build a config's model for the computation of features.

    Raises:
        ConfigError: a backbone that trains, or a preprocessor that mixes images.
    """
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
        model = MODELS.build(cfg.model)
    model.init_weights()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    frozen = frozen_part(model.backbone)
    if getattr(model.data_preprocessor, "batch_augments", None):
        raise ConfigError(
            "feature cache: the preprocessor mixes images (batch_augments); leave them out"
        )
    asked = asked_dtype(cfg) or "fp32"
    computed = choose_dtype(asked, device)
    if computed == "bf16":
        autocast_parts(model, DTYPES[computed])
    return CachedModel(model, frozen, frozen is not model.backbone, asked, computed)


def frozen_part(backbone: nn.Module) -> nn.Module:
    """The backbone if nothing of it trains, else the frozen backbone inside an adapter.

    Raises:
        ConfigError: neither is frozen.
    """
    inner = getattr(backbone, "backbone", None)
    for module in (backbone, inner):
        if module is not None and not any(p.requires_grad for p in module.parameters()):
            return module
    names = [name for name, value in (inner or backbone).named_parameters() if value.requires_grad]
    raise ConfigError(
        f"feature cache: the backbone is not frozen ({len(names)} of its tensors train, "
        f"such as {names[0]}); set frozen_stages to the number of its blocks"
    )


def detour(module: nn.Module, around: Callable[[Callable], Callable]) -> None:
    """Put a function around every way into a module; looked up at each call, so that a change of
    the module's class, as for autocast, is not undone."""
    for name in _ENTRIES:
        if hasattr(type(module), name):
            entry = lambda *a, _name=name, **k: getattr(type(module), _name)(module, *a, **k)  # noqa: E731
            setattr(module, name, around(entry))


class SeenError(Exception):
    """The backbone has been called; what comes after it is not needed."""


@contextmanager
def recorded(module: nn.Module, calls: list, *, stop: bool) -> Iterator[None]:
    """Note outputs and input sizes of a module."""
    depth = [0]

    def around(entry: Callable) -> Callable:
        def forward(inputs: Tensor, *args: Any, **options: Any) -> Any:
            depth[0] += 1
            try:
                outputs = entry(inputs, *args, **options)
            finally:
                depth[0] -= 1
            if depth[0] == 0:
                calls.append((outputs, tuple(inputs.shape[-2:])))
                if stop:
                    raise SeenError
            return outputs

        return forward

    detour(module, around)
    try:
        yield
    finally:
        for name in _ENTRIES:
            module.__dict__.pop(name, None)


# --- Views of an image, and the labels that fit them ---
#
# A cache cannot hold what changes with every reading. The first view of an image is therefore that
# of the evaluation, without a random step; further views are the config's own random flips, crops
# and scales, drawn once, from the name of the image. Colours are as in the files.
#
# The features of a view and its labels come from the same steps, run twice: with the image and
# without labels where features are computed, with labels and an empty image of the same size where
# a head trains. So labels are never stored, and have the geometry of the features.


SIZE = "cached_size"
# Steps that other images take part in, and steps that change colours at random.
_MIXING = ("mosaic", "mixup", "cutmix", "copypaste")
_COLOURS = (
    "photometric", "distortion", "jitter", "color", "colour", "brightness", "contrast", "gamma",
    "saturation", "lighting", "solarize", "posterize", "equalize", "invert", "sharpness", "blur",
    "noise", "erasing", "cutout", "augment",
)  # fmt: skip
_RANDOM = ("random", "rotate", "shear", "translate", "expand", "minioucrop")


class Views:
    """The pipelines of the views of a data set.

    Attributes:
        first: steps of the view of the evaluation.
        further: steps of the other views, random ones among them; empty if nothing is random.
        notes: what was replaced, in words.
    """

    def __init__(self, first: list[dict], further: list[dict], notes: list[str]) -> None:
        self.first, self.further, self.notes = first, further, notes

    def steps(self, view: int) -> list[dict]:
        """Steps of a view by number."""
        return self.further if view else self.first

    def name(self, view: int) -> str:
        """A name of a view that changes with its steps."""
        if not view:
            return "0"
        text = json.dumps(plain(for_features(self.further)), sort_keys=True)
        return f"{view}:{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def training_views(cfg: Config) -> Views:
    """The views of a config's training images.

    The first random crop or scale is replaced by the geometry of the validation pipeline; flips,
    turns and colours are left out. Label maps want crops of one size: their random crop becomes the
    middle of the image.

    Raises:
        ConfigError: no pipeline or several ones, or a step that mixes images.
    """
    steps = pipeline_of(cfg.train_dataloader.dataset)
    mixing = [_name(step) for step in steps if _says(step, _MIXING)]
    if mixing or "MultiImageMixDataset" in str(cfg.train_dataloader.dataset.type):
        raise ConfigError(
            f"feature cache: the training data mix images ({', '.join(mixing) or 'data set'}); "
            "features are those of one image: leave these steps out"
        )
    validation = pipeline_of(cfg.val_dataloader.dataset) if cfg.get("val_dataloader") else []
    geometry = [step for step in validation if not _is_frame(step) and step not in steps]
    maps = cfg.get("default_scope") == "mmseg"
    first, further, replaced, dropped = [], [], [], []
    is_scaled = False
    for step in steps:
        if step in validation or not (_is_random(step) or _says(step, _COLOURS)):
            first.append(step)
            further.append(step)
            continue
        put = []
        if not _says(step, _COLOURS):
            further.append(_free_of_labels(step))
            if maps and _says(step, ("crop",)) and "crop_size" in step:
                put = [dict(type="MiddleCrop", crop_size=step["crop_size"])]
            elif _cuts_or_scales(step):
                put = [] if is_scaled else geometry
                is_scaled = True
        first += put
        if put:
            replaced.append(f"{_name(step)} by {', '.join(map(_name, put))}")
        else:
            dropped.append(_name(step))
    notes = [f"replaced {', '.join(replaced)}, as in validation"] if replaced else []
    notes += [f"left out {', '.join(dropped)}"] if dropped else []
    return Views(first, further if further != first else [], notes)


def validation_views(loader: Mapping) -> Views:
    """The one view of validation images."""
    return Views(pipeline_of(loader["dataset"]), [], [])


def pipeline_of(dataset: Mapping) -> list[dict]:
    """The pipeline of a data set, or of those that it wraps.

    Raises:
        ConfigError: there is none, or they differ.
    """
    found = [part["pipeline"] for part in _with_pipeline(dataset)]
    if not found or any(steps != found[0] for steps in found):
        raise ConfigError(
            f"feature cache: {len(found)} different pipelines in one data set; expected one"
        )
    return [step.to_dict() if hasattr(step, "to_dict") else dict(step) for step in found[0]]


def without_pipeline(dataset: Mapping) -> dict:
    """A copy of a data set's config that gives its records as they are, before any step."""
    dataset = copy.deepcopy(dataset)
    for part in _with_pipeline(dataset):
        part["pipeline"] = []
    return dataset


def for_features(steps: Sequence[dict]) -> list[dict]:
    """Steps without labels; a file that cannot be read is an error, to be written down."""
    kept = []
    for step in steps:
        if _loads_image(step):
            step = {**step, "broken": "error"} if "broken" in step else step
        elif _loads(step) or _says(step, ("filter",)):
            continue
        kept.append(step)
    return kept


def for_labels(steps: Sequence[dict], *, with_image: bool, on_pixels: bool) -> list[dict]:
    """Steps that give the labels of cached features.

    Args:
        steps: of a view.
        with_image: read the image too, for a model that looks at it beside the features.
        on_pixels: labels lie on the image, so that they go through its steps.
    """
    if with_image:
        return list(steps)
    empty = [_placeholder(step) if _loads_image(step) else step for step in steps]
    if on_pixels:
        return empty
    return [step for step in empty if _is_frame(step) or step["type"] == "EmptyImage"]


def plain(steps: Sequence[dict]) -> list:
    """Steps as JSON gives them back."""
    return json.loads(json.dumps(Config({"steps": list(steps)}).to_dict()["steps"], default=str))


@contextmanager
def drawn_from(key: str, view: int, salt: int = 0) -> Iterator[None]:
    """Let random steps draw what belongs to a view of an image, and nothing else notice it."""
    numpy_state, python_state, torch_state = (
        np.random.get_state(),
        random.getstate(),
        torch.get_rng_state(),
    )
    seed = zlib.crc32(f"{key}|{view}|{salt}".encode(errors="surrogateescape"))
    np.random.seed(seed)
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        torch.set_rng_state(torch_state)


def stamp() -> int:
    """A number that two runs of the same steps share if they drew the same, as an int32."""
    _, keys, position, *_ = np.random.get_state()
    drawn = zlib.crc32(keys.tobytes(), position)
    drawn = zlib.crc32(repr(random.getstate()[1][-1]).encode(), drawn)
    drawn = zlib.crc32(torch.get_rng_state().numpy().tobytes(), drawn)
    return drawn - 2**31


@TRANSFORMS.register_module()
class EmptyImage:
    """Stands for the image where its features are known: black, of its size.

    Args:
        to_float32: give float32.
    """

    def __init__(self, *, to_float32: bool = False) -> None:
        self.to_float32 = to_float32

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        height, width, orientation = results.pop(SIZE)
        dtype = np.float32 if self.to_float32 else np.uint8
        results["img"] = np.zeros((height, width, 3), dtype)
        results["img_shape"] = results["ori_shape"] = (height, width)
        if orientation != 1:
            results[ORIENTATION] = orientation
        return results

    def __repr__(self) -> str:
        return f"EmptyImage(to_float32={self.to_float32})"


@TRANSFORMS.register_module()
class MiddleCrop:
    """Cuts the middle out of an image and its maps; smaller ones stay as they are.

    Args:
        crop_size: (height, width), or the length of both sides.
    """

    def __init__(self, crop_size: int | Sequence[int]) -> None:
        self.crop_size = (crop_size, crop_size) if isinstance(crop_size, int) else tuple(crop_size)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        sides = results["img"].shape[:2]
        top, left = (max(a - b, 0) // 2 for a, b in zip(sides, self.crop_size))
        bottom, right = top + self.crop_size[0], left + self.crop_size[1]
        for key in ("img", *results.get("seg_fields", [])):
            results[key] = np.ascontiguousarray(results[key][top:bottom, left:right])
        results["img_shape"] = results["img"].shape[:2]
        return results

    def __repr__(self) -> str:
        return f"MiddleCrop(crop_size={self.crop_size})"


def _with_pipeline(part: Any) -> Iterator[dict]:
    if isinstance(part, Mapping):
        if "pipeline" in part and "type" in part:
            yield part
        for name, value in part.items():
            if name != "pipeline":
                yield from _with_pipeline(value)
    elif isinstance(part, (list, tuple)):
        for value in part:
            yield from _with_pipeline(value)


def _name(step: Mapping) -> str:
    return step["type"].split(".")[-1]


def _says(step: Mapping, words: Sequence[str]) -> bool:
    return any(word in _name(step).lower() for word in words)


def _loads(step: Mapping) -> bool:
    return _name(step).startswith("Load")


def _loads_image(step: Mapping) -> bool:
    return _name(step) in ("LoadMissingImage", "LoadImageFromFile")


def _is_frame(step: Mapping) -> bool:
    """Whether a step begins or ends a pipeline, whatever the geometry."""
    return _loads(step) or _name(step).startswith("Pack")


def _is_random(step: Mapping) -> bool:
    return _says(step, _RANDOM) and step.get("prob", 1) != 0


def _cuts_or_scales(step: Mapping) -> bool:
    return _says(step, ("crop", "resize", "choice", "affine", "expand"))


def _free_of_labels(step: dict) -> dict:
    """A random step whose draws do not look at labels, which may change after it was cached."""
    step = dict(step)
    if step.get("cat_max_ratio", 1) != 1:
        step["cat_max_ratio"] = 1.0
    if "crop" in _name(step).lower() and "allow_negative_crop" in step:
        step["allow_negative_crop"] = True
    if "transforms" in step:
        step["transforms"] = [
            [_free_of_labels(inner) for inner in part]
            if isinstance(part, (list, tuple))
            else _free_of_labels(part)
            for part in step["transforms"]
        ]
    return step


def _placeholder(step: Mapping) -> dict:
    return dict(type="EmptyImage", to_float32=bool(step.get("to_float32")))
