"""Detection configs on annotation files of one's own: files, classes and numbers by name.

A config of mmdet repeats the names of the classes, their number and the annotation files up to
twelve times, and nothing holds one against the other. Here they are taken from the files where the
config does not say, compared by name where it does, and set everywhere.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config, ConfigDict

from dinov3_mm.datasets.coco import (
    AnnotationError,
    CocoFile,
    check_classes,
    compare_names,
    read_coco,
)
from dinov3_mm.errors import ConfigError

# Data sets and metrics that count by place in the file, and ours that follow names.
_DATASETS = ("CocoDataset", "mmdet.CocoDataset", "NamedCocoDataset")
_METRICS = ("CocoMetric", "mmdet.CocoMetric", "NamedCocoMetric")
_MODULE = "dinov3_mm.datasets.named_coco"
# How files and folders of a split are named by COCO, Roboflow, CVAT, Label Studio and by hand.
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}


def coco_parts(cfg: Mapping, split: str) -> list[dict]:
    """The COCO data sets of ``train``, ``val`` or ``test``."""
    return list(_typed(cfg.get(f"{split}_dataloader"), _DATASETS))


def is_coco_config(cfg: Mapping) -> bool:
    """Whether a config reads objects in COCO's format."""
    return any(coco_parts(cfg, split) for split in ("train", "val", "test"))


def set_coco_root(cfg: Config, folder: Path) -> bool:
    """Find annotation files and images below a folder, where the config's own are not there.

    Returns:
        Whether the config's data sets were set; False where it reads no COCO files, or its own
        files lie in the folder.

    Raises:
        ConfigError: no annotation file for a split, several that may be meant, or no images.
    """
    if not is_coco_config(cfg):
        return False
    own = [_moved(part, folder) for split in ("train", "val") for part in coco_parts(cfg, split)]
    if all(path.is_file() for path in own):
        return False
    found = {split: _annotations_of(folder, split) for split in SPLITS}
    found["test"] = found["val"]
    for split, path in found.items():
        images = _images_of(folder, path, split)
        for part in coco_parts(cfg, split):
            part["data_root"] = ""
            part["ann_file"] = str(path)
            part["data_prefix"] = dict(img=str(images) + os.sep)
    return True


def settle_objects(cfg: Config, *, splits: Sequence[str], known: Sequence[str] = ()) -> list[str]:
    """Bring classes, their number and the files of a detection config in line, by name.

    The classes are, in this order: ``known``; ``metainfo.classes`` of the training data; COCO's,
    if they are those of the training file; those of the training file, by ascending id.

    Args:
        cfg: config of mmdet, changed in place; any other is left alone.
        splits: what the run reads: 'train' and 'val', or 'test'.
        known: classes of a trained detector, in the order of its outputs.

    Returns:
        Lines for the log.

    Raises:
        ConfigError: names of files and config that do not fit, an annotation file that cannot be
            used, or images that are not there.
    """
    splits = [split for split in splits if coco_parts(cfg, split)]
    if not splits:
        return []
    _follow_names(cfg)
    try:
        files = {
            split: [read_coco(_annotation_path(part)) for part in coco_parts(cfg, split)]
            for split in splits
        }
        classes, lines = _classes(cfg, splits[0], files[splits[0]], known)
        lines += _set_classes(cfg, classes)
        lines += _compare(classes, files)
    except AnnotationError as error:
        raise ConfigError(str(error)) from error
    for split in splits:
        for part, file in zip(coco_parts(cfg, split), files[split], strict=True):
            _refuse_absent_images(part, file)
        lines += _score_on_the_same_file(cfg, split)
    return lines


def _classes(
    cfg: Config, split: str, files: Sequence[CocoFile], known: Sequence[str]
) -> tuple[tuple[str, ...], list[str]]:
    from mmdet.datasets import CocoDataset

    if known:
        return tuple(known), []
    given = {
        check_classes(part["metainfo"]["classes"], f"{split}_dataloader.dataset.metainfo.classes")
        for part in coco_parts(cfg, split)
        if (part.get("metainfo") or {}).get("classes")
    }
    if len(given) > 1:
        raise ConfigError(f"the data sets of {split}_dataloader name different classes: {given}")
    if given:
        return given.pop(), []
    default = CocoDataset.METAINFO["classes"]
    names = files[0].names
    if set(names) == set(default):
        return default, []
    if split == "test":  # without a training file, the config's model says what it finds
        return default, []
    return names, [f"classes are those of {files[0].path}: {', '.join(names)}"]


def _set_classes(cfg: Config, classes: Sequence[str]) -> list[str]:
    from mmdet.datasets import CocoDataset

    for split in ("train", "val", "test"):
        for part in coco_parts(cfg, split):
            metainfo = dict(part.get("metainfo") or {})
            if metainfo.get("classes"):
                where = f"{split}_dataloader.dataset.metainfo.classes"
                own = check_classes(metainfo["classes"], where)
                if set(own) != set(classes):
                    raise ConfigError(
                        f"{where} are {', '.join(own)}, those of training {', '.join(classes)}; "
                        "leave them out there: they follow training"
                    )
            elif tuple(classes) == CocoDataset.METAINFO["classes"]:
                continue
            metainfo["classes"] = tuple(classes)
            metainfo.setdefault("palette", colours(len(classes)))
            part["metainfo"] = ConfigDict(metainfo)
    return _set_numbers(cfg, len(classes))


def _set_numbers(cfg: Config, count: int) -> list[str]:
    lines = []
    for part in _dicts(cfg.model):
        if part.get("num_classes", count) == count:
            continue
        lines.append(f"{part.get('type')}: num_classes is {count}, was {part['num_classes']}")
        part["num_classes"] = count
        if part.get("category_ids") is not None:
            part["category_ids"] = None
            lines.append(f"{part.get('type')}: category_ids is None: outputs are the classes")
        if (part.get("init_cfg") or {}).get("type") == "DINOv3HeadPretrained":
            part["init_cfg"] = None
            lines.append(f"{part.get('type')}: the released head has other classes; it starts anew")
    return lines


def _compare(classes: Sequence[str], files: Mapping[str, Sequence[CocoFile]]) -> list[str]:
    lines = []
    for split, of_split in files.items():
        for file in of_split:
            lines += compare_names(classes, file, is_training=split == "train")
    return lines


def _follow_names(cfg: Config) -> None:
    """Replace what counts by place; the config that is written into the work folder says so."""
    for parts, types, name in (
        ([cfg.get(f"{s}_dataloader") for s in ("train", "val", "test")], _DATASETS, "Dataset"),
        ([cfg.get(f"{s}_evaluator") for s in ("val", "test")], _METRICS, "Metric"),
    ):
        for part in _typed(parts, types):
            part["type"] = f"NamedCoco{name}"
    imports = cfg.get("custom_imports") or dict(imports=[], allow_failed_imports=False)
    names = imports["imports"]
    names = [names] if isinstance(names, str) else list(names)
    if _MODULE not in names:
        cfg.custom_imports = dict(imports, imports=[*names, _MODULE])


def _score_on_the_same_file(cfg: Config, split: str) -> list[str]:
    if split == "train" or len(coco_parts(cfg, split)) != 1:
        return []
    path = str(_annotation_path(coco_parts(cfg, split)[0]))
    lines = []
    for metric in _typed(cfg.get(f"{split}_evaluator"), _METRICS):
        own = metric.get("ann_file")
        if own is not None and Path(own) != Path(path):
            lines.append(f"{split}_evaluator.ann_file is that of {split}_dataloader: {path}")
            metric["ann_file"] = path
    return lines


def _refuse_absent_images(part: Mapping, file: CocoFile) -> None:
    folder = _joined(part, (part.get("data_prefix") or {}).get("img", ""))
    absent = [
        folder / image["file_name"]
        for image in file.images
        if not (folder / image["file_name"]).is_file()
    ]
    if absent:
        raise ConfigError(
            f"{len(absent)} of the {len(file.images)} images of {file.path} are not there, first "
            f"{absent[0]}; set data_prefix=dict(img=...) of the data set to their folder, or take "
            "them out of the file"
        )


# ---------------------------------------------------------------------------------------------
# Files below a folder


def _annotations_of(folder: Path, split: str) -> Path:
    names = SPLITS[split]
    every = sorted(
        path
        for pattern in ("*.json", "*/*.json", "*/*/*.json")
        for path in folder.glob(pattern)
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    matching = [path for path in every if _is_of(path.relative_to(folder), names)]
    if len(matching) > 1:  # COCO has captions and keypoints beside objects
        objects = [
            path for path in matching if "instances" in path.stem or "_annotations" in path.stem
        ]
        matching = objects or matching
    if len(matching) == 1:
        return matching[0]
    listed = ", ".join(str(path.relative_to(folder)) for path in (matching or every)[:8])
    if matching:
        raise ConfigError(
            f"--data: {folder} has several annotation files for {split} ({listed}); leave one, or "
            f"name it: --cfg-options {split}_dataloader.dataset.ann_file=..."
        )
    raise ConfigError(
        f"--data: {folder} has no annotation file for {split}; expected a JSON file with one of "
        f"{', '.join(names)} in its name or its folder's, found {listed or 'no JSON file'}"
    )


def _is_of(path: Path, names: Sequence[str]) -> bool:
    """Whether one of the names is a word of the file's name, or the name of its folder."""
    stem = path.stem.lower()
    for mark in "-. 0123456789":
        stem = stem.replace(mark, "_")
    return bool(set(names) & {*stem.split("_"), *(part.lower() for part in path.parts[:-1])})


def _images_of(folder: Path, annotations: Path, split: str) -> Path:
    try:
        names = [image["file_name"] for image in read_coco(annotations).images[:3]]
    except AnnotationError as error:
        raise ConfigError(str(error)) from error
    splits = [*SPLITS.get(split, SPLITS["val"]), f"{split}2017", annotations.stem]
    if split == "test":
        splits += [*SPLITS["val"], "val2017"]
    tried = [
        annotations.parent,
        folder,
        folder / "images",
        *(folder / name for name in splits),
        *(folder / "images" / name for name in splits),
        annotations.parent / "images",
    ]
    for candidate in tried:
        if all((candidate / name).is_file() for name in names):
            return candidate
    looked = ", ".join(str(path) for path in tried[:6])
    raise ConfigError(
        f"--data: found no folder that holds {names[0]}, the first image of {annotations}; looked "
        f"into {looked} and others"
    )


def _moved(part: Mapping, folder: Path) -> Path:
    """The annotation file of a data set whose root becomes ``folder``."""
    root, path = part.get("data_root") or "", part.get("ann_file") or ""
    relative = path.removeprefix(root).lstrip("/") if root and path.startswith(root) else path
    return folder / relative


def _annotation_path(part: Mapping) -> Path:
    return _joined(part, part.get("ann_file") or "")


def _joined(part: Mapping, path: str) -> Path:
    return Path(part.get("data_root") or "").expanduser() / path


def colours(count: int) -> list[tuple[int, int, int]]:
    """Colours of equally spaced hues, RGB, for pictures of ``count`` classes."""
    hues = np.arange(count)[:, None] / max(count, 1) + np.array([0.0, 1 / 3, 2 / 3])
    levels = 140 + 110 * np.cos(2 * np.pi * hues)
    return [tuple(int(value) for value in np.clip(level, 0, 255)) for level in levels]


def _typed(part: Any, types: Sequence[str]) -> Iterator[dict]:
    for each in _dicts(part):
        if each.get("type") in types:
            yield each


def _dicts(part: Any) -> Iterator[dict]:
    if isinstance(part, dict):
        yield part
        part = list(part.values())
    if isinstance(part, (list, tuple)):
        for value in part:
            yield from _dicts(value)
