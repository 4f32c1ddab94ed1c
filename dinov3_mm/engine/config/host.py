"""Configs of mmpretrain, mmseg and mmdet on our backbones: what a command line sets in them."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_distributed

from dinov3_mm.checkpoints.locate import (
    Statistics,
    find_statistics,
    is_url,
    located,
    parse_hub_name,
)
from dinov3_mm.datasets.image_files import is_hidden
from dinov3_mm.errors import ConfigError

from .check import is_host_config
from .coco import SPLITS, set_coco_root

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
EVALUATORS = ("val_evaluator", "test_evaluator")
_FOLDER_SETS = ("ClassificationFolder", "CustomDataset")  # data sets of one folder a class
_CLASSIFIERS = ("ImageClassifier", "mmpretrain.ImageClassifier")
# Flags of the hosts' preprocessors after which the channels are red, green, blue.
_TO_RGB = ("bgr_to_rgb", "to_rgb")


def is_classifier(cfg: Mapping) -> bool:
    """Whether the model of a config is mmpretrain's image classifier."""
    model = cfg.get("model") or {}
    while "module" in model:  # of test-time augmentation
        model = model["module"]
    return model.get("type") in _CLASSIFIERS


# The initializers that load weights: of backbones, and of heads.
BACKBONE, HEAD = "DINOv3Pretrained", "DINOv3HeadPretrained"


def initializers(model: Any, kind: str = BACKBONE) -> list[dict]:
    """The configs by which backbones (or heads) inside a model load their weights."""
    return [part for part in _dicts(model) if part.get("type") == kind]


def leave_random(cfg: Config) -> None:
    """Let backbones and heads start from their own initialisation."""
    for part in list(_dicts(cfg.model)):
        if (part.get("init_cfg") or {}).get("type") in (BACKBONE, HEAD):
            part["init_cfg"] = None


def set_data_root(cfg: Config, folder: str, *, count_classes: bool = True) -> None:
    """Read every data set from ``folder`` in place of the config's ``data_root``.

    Paths below the old root in data sets and evaluators follow. A classifier of folders gets as
    many classes as there are folders. Annotation files of objects are looked for, see
    :func:`~dinov3_mm.engine.config.coco.set_coco_root`.

    Args:
        cfg: a config of a host, changed in place.
        folder: the root.
        count_classes: set the number of classes; a trained model brings its own.

    Raises:
        ConfigError: the config has no ``data_root``, or there is no such folder.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(f"--data: {path} is no folder; give the root of the data set")
    if set_coco_root(cfg, path):
        return
    parts = [cfg.get(name) for name in (*LOADERS, *EVALUATORS) if cfg.get(name)]
    roots = {part["data_root"] for part in _dicts(parts) if part.get("data_root")}
    if not roots:
        raise ConfigError("--data: no data set of this config has a data_root to replace")
    for part in _dicts(parts):
        for key, value in part.items():
            if isinstance(value, str):
                part[key] = _moved(value, roots, path)
    _find_split_folders(parts)
    if count_classes:
        _set_num_classes(cfg)


def _find_split_folders(parts: list) -> None:
    """Take a folder ``valid`` for ``val``, and so on, where that is what there is."""
    for part in _dicts(parts):
        prefix = part.get("data_prefix")
        if part.get("type") not in _FOLDER_SETS or not isinstance(prefix, str):
            continue
        names = next((names for names in SPLITS.values() if prefix in names), ())
        found = [name for name in names if (Path(part["data_root"]) / name).is_dir()]
        if prefix not in found and len(found) == 1:
            part["data_prefix"] = found[0]


def set_num_outputs(cfg: Config, classes: Sequence[str]) -> list[str]:
    """Give a classifier as many outputs as it was trained with; lines for the log."""
    if not classes or not is_classifier(cfg):
        return []
    parts = [p for p in _dicts(cfg.model) if p.get("num_classes", len(classes)) != len(classes)]
    for part in parts:
        part["num_classes"] = len(classes)
    return [f"num_classes is {len(classes)}, as in the checkpoint"] if parts else []


def _set_num_classes(cfg: Config) -> None:
    dataset = (cfg.get("train_dataloader") or {}).get("dataset") or {}
    if dataset.get("type") not in _FOLDER_SETS or not dataset.get("with_label", True):
        return
    if dataset.get("ann_file"):
        return  # a list of files; the folders are not its classes
    prefix = dataset.get("data_prefix", "")
    prefix = prefix.get("img_path", "") if isinstance(prefix, Mapping) else prefix
    images = Path(dataset["data_root"]) / prefix
    entries = images.iterdir() if images.is_dir() else ()
    classes = [item.name for item in entries if item.is_dir() and not is_hidden(item.name)]
    classes = (dataset.get("metainfo") or {}).get("classes") or classes
    if len(classes) < 2:
        found = f"{len(classes)} ({classes[0]})" if classes else "0"
        raise ConfigError(f"--data: expected one folder a class in {images}, found {found}")
    for part in _dicts(cfg.model):
        if "num_classes" in part:
            part["num_classes"] = len(classes)


def set_host_weights(cfg: Config, weights: str) -> None:
    """Let every backbone of the model start from ``weights``.

    Raises:
        ConfigError: no backbone of the config loads weights.
    """
    found = initializers(cfg.model)
    if not found:
        raise ConfigError(
            "--weights: no backbone of this config loads weights; it needs "
            "init_cfg=dict(type='DINOv3Pretrained', checkpoint=...)"
        )
    for init_cfg in found:
        init_cfg["checkpoint"] = weights


def set_head(cfg: Config, head: str) -> None:
    """Load the head file ``head`` where the config names a kind of head.

    Raises:
        ConfigError: the config has no ``init_cfg`` of type 'DINOv3HeadPretrained', or no such file.
    """
    found = initializers(cfg.model, HEAD)
    if not found:
        raise ConfigError(
            "--head: this config does not load a released head; it needs "
            "init_cfg=dict(type='DINOv3HeadPretrained', kind=..., checkpoint=...)"
        )
    if not is_url(head) and not Path(head).expanduser().exists():
        raise ConfigError(f"--head: {head} does not exist")
    for init_cfg in found:
        init_cfg["checkpoint"] = head


def shorten_warmup(cfg: Config) -> list[str]:
    """Fit a linear warm-up, and what begins after it, into a run that is shorter than it.

    For trials of a few iterations, which MMEngine's schedules would refuse.

    Returns:
        A line for the log, or none.
    """
    total = (cfg.get("train_cfg") or {}).get("max_iters")
    schedules = [part for part in _dicts(cfg.get("param_scheduler")) if "type" in part]
    lines = []
    for warmup in [part for part in schedules if part["type"] == "LinearLR"]:
        end = warmup.get("end")
        if total is None or end is None or warmup.get("by_epoch", True) or end < total:
            continue
        short = total // 10
        lines.append(
            f"WARNING: the warm-up of {end} iterations does not fit into a run of {total}; it "
            f"takes {short}"
        )
        for part in schedules:
            if part.get("begin") == end:
                part["begin"] = short
        warmup["end"] = short
    # MMEngine knows no schedule of no length.
    if lines and short == 0:
        cfg.param_scheduler = [part for part in schedules if part.get("end") != 0]
    return lines


def settle_host(cfg: Config) -> list[str]:
    """Refuse weights that are not there; warn of inputs that they do not expect.

    Returns:
        Lines for the log.

    Raises:
        ConfigError: weights that are neither a file nor a known name.
    """
    lines = []
    if cfg.get("sync_bn") == "torch" and not torch.cuda.is_available():
        cfg.sync_bn = None  # torch synchronises batch norms on accelerators only
        lines.append("sync_bn is off: there is no GPU, and each process takes its own statistics")
    lines += shorten_warmup(cfg)
    lines += settle_loading(cfg)
    for init_cfg in initializers(cfg.model):
        weights = _checked(init_cfg.get("checkpoint"))
        init_cfg["checkpoint"] = weights
        statistics = find_statistics(Path(weights)) if Path(weights).exists() else None
        line = statistics and _other_statistics(cfg.model.get("data_preprocessor"), statistics)
        lines += [line] if line else []
    return lines


def settle_loading(cfg: Config) -> list[str]:
    """Bring the loading of images and of their maps in line where a pipeline mixes two kinds.

    Our image loading turns an image as its EXIF orientation says, and only our loading of maps
    turns the map with it; mmcv's turns images without a word to anyone.

    Returns:
        Lines for the log, one for each step that was replaced.

    Raises:
        ConfigError: a step that has no counterpart here.
    """
    lines = []
    loaders = [cfg[name] for name in LOADERS if cfg.get(name)]
    pipelines = [part["pipeline"] for part in _dicts(loaders) if part.get("pipeline")]
    for pipeline in (*pipelines, cfg.get("tta_pipeline")):
        steps = [step for step in _dicts(pipeline) if isinstance(step.get("type"), str)]
        kinds = {step["type"].split(".")[-1]: step for step in steps}
        image = kinds.get("LoadMissingImage")
        for kind, step in kinds.items():
            if image and kind == "LoadAnnotations" and _is_of(step, cfg, "mmseg"):
                kept = {k: step[k] for k in ("reduce_zero_label", "backend_args") if k in step}
                new = dict(type="LoadLabelMap", broken=image.get("broken", "error"), **kept)
                lines += _replaced(step, new, "LoadMissingImage")
            elif not image and kind == "LoadImageFromFile" and set(kinds) & set(_OUR_MAPS):
                kept = {k: step[k] for k in ("to_float32", "backend_args") if k in step}
                maps = next(k for k in kinds if k in _OUR_MAPS)
                new = dict(type="LoadMissingImage", broken=kinds[maps].get("broken", "error"))
                lines += _replaced(step, {**new, **kept}, maps)
            elif image and (kind in _FOREIGN_MAPS or step.get("with_seg")):
                raise ConfigError(
                    f"{kind} beside LoadMissingImage: it does not turn the map where the EXIF "
                    "orientation turns the image; load both with steps of the host, or with "
                    "LoadMissingImage and LoadLabelMap (LoadDepthMap)"
                )
    return list(dict.fromkeys(lines))


# Steps that load maps: ours turn with LoadMissingImage, these of the hosts do not.
_OUR_MAPS = ("LoadLabelMap", "LoadDepthMap")
_FOREIGN_MAPS = ("LoadDepthAnnotation", "LoadPanopticAnnotations")


def _is_of(step: Mapping, cfg: Config, host: str) -> bool:
    scope, _, _ = step["type"].rpartition(".")
    return (scope or cfg.get("default_scope")) == host


def _replaced(step: dict, new: dict, beside: str) -> list[str]:
    """Replace a step in place; a line for the log."""
    old = step["type"]
    left = sorted(set(step) - set(new))
    step.clear()
    step.update(new)
    return [
        f"WARNING: {old} beside {beside} would not turn image and map alike where a file has an "
        f"EXIF orientation: {new['type']} takes its place"
        + (f", without {', '.join(left)}" if left else "")
    ]


def for_cpu_ranks(cfg: Config) -> Config:
    """A config whose runner wraps the model for several processes without GPUs.

    MMEngine gives torch the index of a GPU in any case, which torch refuses.
    """
    if not is_host_config(cfg) or not is_distributed() or torch.cuda.is_available():
        return cfg
    settings = {
        "type": "MMDistributedDataParallel",
        "broadcast_buffers": False,
        "find_unused_parameters": cfg.get("find_unused_parameters", False),
        **(cfg.get("model_wrapper_cfg") or {}),
    }
    changed = copy.deepcopy(cfg)
    changed.model_wrapper_cfg = {**settings, "device_ids": None}
    return changed


def _checked(weights: str | None) -> str:
    if weights is None:
        raise ConfigError(
            "no weights for the backbone: give them with --weights FILE (an official .pth, a "
            "Hugging Face or timm file or folder, an export), or set its init_cfg=None to leave it "
            "random"
        )
    try:
        found = str(located(weights))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"weights of the backbone: {error}") from error
    path = Path(found).expanduser()
    if path.exists():
        return str(path)
    if is_url(found) or parse_hub_name(found) is not None:
        return found
    raise ConfigError(
        f"weights of the backbone: {found} does not exist; give another file with --weights FILE"
    )


def _other_statistics(preprocessor: dict | None, statistics: Statistics) -> str | None:
    """A warning where inputs are normalised otherwise than the weights expect.

    The config decides: a host's inference reads the same config, and would not know of a change.
    """
    if not preprocessor or not any(preprocessor.get(flag) for flag in _TO_RGB):
        return None
    mean = [round(255 * value, 3) for value in statistics.mean]
    std = [round(255 * value, 3) for value in statistics.std]
    if _close(preprocessor.get("mean"), mean) and _close(preprocessor.get("std"), std):
        return None
    return (
        f"WARNING: the weights expect inputs of mean {mean} and std {std} ({statistics.name}), the "
        f"config has {preprocessor.get('mean')} and {preprocessor.get('std')}; set them as "
        "model.data_preprocessor.mean and .std in the config"
    )


def _close(given: Sequence[float] | None, wanted: Sequence[float]) -> bool:
    return given is not None and all(abs(a - b) < 0.01 for a, b in zip(given, wanted, strict=True))


def _moved(value: str, roots: set[str], target: Path) -> str:
    """A path below one of ``roots`` as one below ``target``; any other string as it is."""
    for root in roots:
        if value == root or value.startswith(root.rstrip("/") + "/"):
            return str(target / value.removeprefix(root).lstrip("/"))
    return value


def _dicts(part: Any) -> Iterator[dict]:
    if isinstance(part, dict):
        yield part
        part = list(part.values())
    if isinstance(part, (list, tuple)):
        for value in part:
            yield from _dicts(value)
