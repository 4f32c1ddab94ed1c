"""Configs of mmpretrain, mmseg and mmdet on our backbones: what a command line sets in them."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_distributed

from dinov3_mm.checkpoints.download import is_url
from dinov3_mm.checkpoints.model_hub import parse_hub_name
from dinov3_mm.checkpoints.released import located
from dinov3_mm.checkpoints.statistics import Statistics, find_statistics
from dinov3_mm.datasets.image_files import is_hidden
from dinov3_mm.engine.coco_config import set_coco_root
from dinov3_mm.engine.config import ConfigError

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
EVALUATORS = ("val_evaluator", "test_evaluator")
_FOLDER_SETS = ("ClassificationFolder", "CustomDataset")  # data sets of one folder a class
# Flags of the hosts' preprocessors after which the channels are red, green, blue.
_TO_RGB = ("bgr_to_rgb", "to_rgb")


def is_host_config(cfg: Mapping) -> bool:
    """Whether a config belongs to MMEngine's plain Runner, as those of the hosts do."""
    return cfg.get("runner_type") != "FlexibleRunner"


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


def set_data_root(cfg: Config, folder: str) -> None:
    """Read every data set from ``folder`` in place of the config's ``data_root``.

    Paths below the old root in data sets and evaluators follow. A classifier of folders gets as
    many classes as there are folders. Annotation files of objects are looked for, see
    :func:`~dinov3_mm.engine.coco_config.set_coco_root`.

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
    _set_num_classes(cfg)


def _set_num_classes(cfg: Config) -> None:
    dataset = (cfg.get("train_dataloader") or {}).get("dataset") or {}
    if dataset.get("type") not in _FOLDER_SETS or not dataset.get("with_label", True):
        return
    prefix = dataset.get("data_prefix", "")
    prefix = prefix.get("img_path", "") if isinstance(prefix, Mapping) else prefix
    images = Path(dataset["data_root"]) / prefix
    entries = images.iterdir() if images.is_dir() else ()
    classes = [item.name for item in entries if item.is_dir() and not is_hidden(item.name)]
    if len(classes) < 2:
        raise ConfigError(f"--data: expected one folder a class in {images}, found {len(classes)}")
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
    for init_cfg in initializers(cfg.model):
        weights = _checked(init_cfg.get("checkpoint"))
        init_cfg["checkpoint"] = weights
        statistics = find_statistics(Path(weights)) if Path(weights).exists() else None
        line = statistics and _other_statistics(cfg.model.get("data_preprocessor"), statistics)
        lines += [line] if line else []
    return lines


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
