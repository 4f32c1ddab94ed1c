"""What the rules need to know about a run before anything of it is built."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from mmengine.registry import DATASETS, MODELS

from dinov3_mm.engine.config import ConfigError
from dinov3_mm.evaluation.held_out import HeldOutSplit

from .rules import held_out_every

# Where 'auto' asks for a rule, beside the heads of the model.
SECTIONS = ("train_cfg", "train_dataloader", "optim_wrapper", "custom_hooks", "default_hooks")


@dataclass(frozen=True)
class DataFacts:
    """Sizes of the data set.

    Attributes:
        num_images: images of the source, held-out ones included.
        num_train: images that are trained on.
        every: one image in how many is held out; None without a split.
    """

    num_images: int
    num_train: int
    every: int | None


@dataclass(frozen=True)
class BackboneFacts:
    """Size of the backbone.

    Attributes:
        width: channels of a token.
        num_params: trainable values.
        token_stride: pixels between neighbouring tokens.
        is_conv: whether it has no mask token.
    """

    width: int
    num_params: int
    token_stride: int
    is_conv: bool


def data_facts(source_cfg: Mapping, every: int | None = None) -> DataFacts:
    """Count the images of a training source.

    Args:
        source_cfg: config of ``train_dataloader.source``.
        every: share of a ``HeldOutSplit`` that says 'auto'; None derives it.

    Raises:
        ConfigError: the source says no folder, or cannot be built.
    """
    is_split = source_cfg["type"] in ("HeldOutSplit", HeldOutSplit)
    inner_cfg = source_cfg["source"] if is_split else source_cfg
    try:
        inner = DATASETS.build(copy.deepcopy(dict(inner_cfg)))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"train_dataloader.source: {error}") from error
    if not is_split:
        return DataFacts(len(inner), len(inner), None)
    if source_cfg["every"] != "auto":
        every = source_cfg["every"]
    elif every is None:
        every = held_out_every(len(inner)).value
    return DataFacts(len(inner), len(HeldOutSplit(inner, "train", every)), every)


def backbone_facts(backbone_cfg: Mapping) -> BackboneFacts:
    """Build the backbone without storage and measure it."""
    cfg = {key: value for key, value in backbone_cfg.items() if key != "init_cfg"}
    with torch.device("meta"):
        backbone = MODELS.build(cfg)
    return BackboneFacts(
        width=backbone.embed_dims,
        num_params=sum(param.numel() for param in backbone.parameters()),
        token_stride=backbone.token_stride,
        is_conv=not hasattr(backbone, "mask_token"),
    )


def tokens_per_image(transform: Mapping, token_stride: int) -> int:
    """Tokens of the student for one image: two global crops and the local ones.

    Of several sets of sizes, those of the largest.
    """
    counts = []
    for given in transform.get("size_sets") or [{}]:
        sizes = {"global_size": 224, "local_size": 96, "num_local": 8, **transform, **given}
        sides = [sizes[f"{kind}_size"] // token_stride for kind in ("global", "local")]
        counts.append(2 * sides[0] ** 2 + sizes["num_local"] * sides[1] ** 2)
    return max(counts)


def gpu_gib() -> float | None:
    """Memory of this process's GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30


def auto_places(cfg: Mapping) -> list[str]:
    """Paths of the values 'auto'; arguments of the backbone have 'auto' of their own."""
    places = []
    for key in SECTIONS:
        places += _auto_below(cfg.get(key), key)
    for head in ("dino_head", "ibot_head"):
        places += _auto_below(cfg["model"].get(head), f"model.{head}")
    return places


def _auto_below(value: object, path: str) -> list[str]:
    if isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    else:
        return [path] if isinstance(value, str) and value == "auto" else []
    return [place for key, item in children for place in _auto_below(item, f"{path}.{key}")]
