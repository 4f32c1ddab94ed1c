"""Labelled images for hosts: a folder a class, and scenes with their truth."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from dinov3_mm.errors import hint, nearest

from .class_names import map_classes
from .coco import check_classes
from .sources import ImageFolder
from .synthetic_scenes import SyntheticScenes

# --- Folders of images as a data set of mmpretrain: one folder a class ---


@DATASETS.register_module()
class ClassificationFolder(BaseDataset):
    """Images in one folder a class; the sorted names of the folders are the classes.

    In place of mmpretrain's ``CustomDataset``: the same images as :class:`ImageFolder` finds, so
    every ending that the decoder reads, through links, without hidden entries. A folder without
    images is a class too.

    Args:
        data_root: root of the data set.
        data_prefix: folder of the classes below it.
        metainfo: ``classes`` are the names in the order of the labels. Folders are matched by name;
            as many names of which no folder bears one rename the folders, in their sorted order.
        pipeline, test_mode, lazy_init, indices, filter_cfg, serialize_data, max_refetch: as in
            every data set of MMEngine.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds no images, images outside of the folders of the classes, or folders
            of other names than ``metainfo`` gives.
    """

    def __init__(
        self,
        data_root: str = "",
        data_prefix: str | dict[str, str] = "",
        *,
        metainfo: dict | None = None,
        pipeline: Sequence[dict | Callable] = (),
        **kwargs: Any,
    ) -> None:
        if isinstance(data_prefix, str):
            data_prefix = {"img_path": data_prefix}
        root = str(Path(data_root).expanduser()) if data_root else ""
        super().__init__(
            data_root=root,
            data_prefix=dict(data_prefix),
            metainfo=metainfo,
            pipeline=list(pipeline),
            **kwargs,
        )

    def load_data_list(self) -> list[dict[str, Any]]:
        """Paths and labels of all images."""
        folder = ImageFolder(self.data_prefix["img_path"])
        if not folder.classes:
            raise ValueError(
                f"{folder.root} holds images outside of class folders, e.g. {folder.stray}; "
                "expected one folder a class, and nothing beside them: move them into one"
            )
        self.class_folders = folder.classes
        numbers = self._numbers(folder)
        _say_how_deep(folder)
        entries = []
        for index in range(len(folder)):
            label = numbers[folder.label(index)]
            entries.append({"img_path": folder.path(index), "gt_label": label})
        return entries

    def _numbers(self, folder: ImageFolder) -> list[int]:
        """Label of each folder."""
        given = self._metainfo.get("classes")
        if given is None:
            self._metainfo["classes"] = folder.classes
            return list(range(len(folder.classes)))
        classes = check_classes(given, "metainfo.classes")
        self._metainfo["classes"] = classes
        if self._renames(classes, folder.classes):
            pairs = [f"{old} is {new!r}" for old, new in zip(folder.classes, classes)]
            shown = ", ".join(pairs[:5]) + (", ..." if len(pairs) > 5 else "")
            print_log(f"{folder.root}: folders renamed in their order: {shown}", logger="current")
            return list(range(len(classes)))
        labels = [folder.label(index) for index in range(len(folder))]
        numbers, lines = map_classes(
            classes,
            folder.classes,
            owner="metainfo.classes",
            where=folder.root,
            counts=np.bincount(labels, minlength=len(folder.classes)).tolist(),
        )
        for line in lines:
            print_log(line, logger="current")
        return numbers

    @staticmethod
    def _renames(classes: tuple[str, ...], folders: tuple[str, ...]) -> bool:
        """Whether names are new ones for all folders, and none looks like that of another."""
        if len(classes) != len(folders) or set(classes) & set(folders):
            return False
        near = [nearest(folder, classes) for folder in folders]
        return all(name in (None, classes[number]) for number, name in enumerate(near))

    def get_cat_ids(self, idx: int) -> list[int]:
        """Class of a sample, for samplers that balance them."""
        return [int(self.get_data_info(idx)["gt_label"])]


def _say_how_deep(folder: ImageFolder) -> None:
    """Log that folders inside those of the classes are no classes, where there are several."""
    inner: dict[int, str] = {}
    for index in range(len(folder)):
        below = os.path.dirname(os.path.relpath(folder.path(index), folder.root))
        if os.sep in below and inner.setdefault(folder.label(index), below) != below:
            print_log(
                f"{folder.root}: folders inside a class folder are no classes: {below} and "
                f"{inner[folder.label(index)]} are both {below.split(os.sep)[0]!r}",
                logger="current",
                level=logging.WARNING,
            )
            return


# --- SyntheticScenes with labels, as a data set of mmpretrain, mmseg or mmdet ---


_SURROUNDINGS = "surroundings"


@DATASETS.register_module()
class SyntheticScenesTask(BaseDataset):
    """Rendered scenes with the ground truth of one downstream task; nothing lies on disk.

    A sample carries ``img`` (BGR, uint8), ``img_path`` (a name, no file), ``img_id``, its sizes
    and, as the hosts name them:

    - 'classification': ``gt_label``, the category of the largest object;
    - 'segmentation': ``gt_seg_map``, categories from 1 on, 0 for the surroundings;
    - 'detection': ``instances`` of the visible objects with box and run-length-encoded mask;
    - 'depth': ``gt_depth_map``, float32, in world units from 1 to 6.

    A pipeline begins with ``LoadMissingImage``, so that it also serves image files.

    Args:
        task: one of the four.
        length, seed, start, image_size: see :class:`SyntheticScenes`.
        pipeline, test_mode, lazy_init, filter_cfg, metainfo: as in every data set of MMEngine;
            there is nothing to filter.

    Raises:
        ValueError: for another task.
    """

    def __init__(
        self,
        task: str,
        length: int,
        *,
        seed: int = 0,
        start: int = 0,
        image_size: int = 96,
        pipeline: list[dict | Callable] = (),
        test_mode: bool = False,
        lazy_init: bool = False,
        filter_cfg: dict | None = None,
        metainfo: dict | None = None,
    ) -> None:
        if task not in _TRUTHS:
            raise ValueError(f"task is {task!r}; {hint(task, _TRUTHS)}")
        self.task = task
        self.scenes = SyntheticScenes(length, seed=seed, start=start, image_size=image_size)
        super().__init__(
            metainfo={**_metainfo(task), **(metainfo or {})},
            data_root="",
            filter_cfg=filter_cfg,
            pipeline=list(pipeline),
            test_mode=test_mode,
            lazy_init=lazy_init,
        )

    def load_data_list(self) -> list[dict[str, Any]]:
        """Names only; scenes are painted when they are asked for."""
        side = self.scenes.image_size
        return [
            {"img_path": self.scenes.path(i), "img_id": i, "height": side, "width": side}
            for i in range(len(self.scenes))
        ]

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """A sample with image and truth."""
        info = super().get_data_info(idx)
        image = np.ascontiguousarray(self.scenes.load_image(info["img_id"])[..., ::-1])
        size = image.shape[:2]
        truth = _TRUTHS[self.task](self.scenes, info["img_id"])
        return {**info, "img": image, "img_shape": size, "ori_shape": size, **truth}

    def image_name(self, idx: int) -> str:
        """``img_path`` of a sample, without painting it."""
        return self.scenes.path(idx)

    def get_cat_ids(self, idx: int) -> list[int]:
        """Categories in a sample, for samplers that balance them."""
        return sorted({item.category for item in self.scenes.scene(idx).objects})


def _metainfo(task: str) -> dict[str, Any]:
    names = SyntheticScenes.classes
    if task == "depth":
        return {"classes": (), "palette": []}  # mmseg's drawing asks for them
    classes = (_SURROUNDINGS, *names) if task == "segmentation" else names
    hues = np.linspace(0, 1, len(names), endpoint=False)
    colours = [_colour(hue) for hue in hues]
    return {
        "classes": tuple(classes),
        "palette": [[40, 40, 40], *colours] if task == "segmentation" else colours,
    }


def _colour(hue: float) -> list[int]:
    ramp = np.mod(np.array([5.0, 3.0, 1.0]) + hue * 6.0, 6.0)
    return [int(value) for value in 255 * (1 - 0.8 * np.clip(np.minimum(ramp, 4 - ramp), 0, 1))]


def _label(scenes: SyntheticScenes, index: int) -> dict[str, Any]:
    return {"gt_label": np.array(scenes.label(index), np.int64)}


def _segments(scenes: SyntheticScenes, index: int) -> dict[str, Any]:
    return {
        "gt_seg_map": scenes.semantic_mask(index).astype(np.uint8),
        "seg_fields": ["gt_seg_map"],
        "reduce_zero_label": False,
    }


def _depth(scenes: SyntheticScenes, index: int) -> dict[str, Any]:
    return {"gt_depth_map": scenes.depth(index), "seg_fields": ["gt_depth_map"]}


def _instances(scenes: SyntheticScenes, index: int) -> dict[str, Any]:
    from pycocotools.mask import encode  # comes with mmdet

    found = scenes.instances(index)
    return {
        "instances": [
            {
                "bbox": box.tolist(),
                "bbox_label": int(label),
                "ignore_flag": 0,
                "mask": encode(np.asfortranarray(mask.astype(np.uint8))),
            }
            for box, label, mask in zip(found["boxes"], found["labels"], found["masks"])
        ]
    }


_TRUTHS: dict[str, Callable[[SyntheticScenes, int], dict[str, Any]]] = {
    "classification": _label,
    "segmentation": _segments,
    "detection": _instances,
    "depth": _depth,
}
