"""Folders of images as a data set of mmpretrain: one folder a class."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from dinov3_mm.datasets.class_names import map_classes
from dinov3_mm.datasets.coco import check_classes
from dinov3_mm.datasets.sources import ImageFolder
from dinov3_mm.suggest import nearest


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
