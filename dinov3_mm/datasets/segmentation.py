"""Folders of images and label maps as a data set of mmseg.

A config lists this module in ``custom_imports``.
"""

import logging
from pathlib import Path
from typing import Any

from dinov3_mm.hosts import require_host

require_host("mmseg")

from mmengine.logging import print_log  # noqa: E402
from mmengine.registry import DATASETS  # noqa: E402
from mmseg.datasets import BaseSegDataset  # noqa: E402

from dinov3_mm.datasets.image_files import (  # noqa: E402
    files_by_name,
    image_extensions,
    open_text,
    text_lines,
)

CLASS_FILE = "classes.txt"


@DATASETS.register_module()
class SegmentationFolder(BaseSegDataset):
    """Images and label maps of the same names, and a file with the names of the classes.

    ::

        root/classes.txt                  one name a line; the first is label 0
        root/images/train/street_1.jpg    any format, also in sub-folders
        root/labels/train/street_1.png    one channel: the class of each pixel, 255 to ignore

    Images without a label map are left out and counted; links are followed, hidden entries are not.

    Args:
        data_root: the root.
        split: folder below ``images`` and ``labels``.
        **kwargs: ``pipeline``, ``test_mode``, ``reduce_zero_label`` and so on of mmseg's
            ``BaseSegDataset``.

    Raises:
        FileNotFoundError: If a folder or the file of classes is missing, or no image has labels.
        ValueError: If two images have the same name, or labels lack their image.
    """

    def __init__(self, data_root: str, split: str, **kwargs: Any) -> None:
        self.split = split
        names = Path(data_root) / CLASS_FILE
        lazy = kwargs.get("lazy_init", False)
        classes = () if lazy and not names.is_file() else _read_classes(names)
        super().__init__(
            data_root=str(data_root), metainfo={"classes": classes} if classes else None, **kwargs
        )

    def load_data_list(self) -> list[dict]:
        """Pairs of image and label map, by name."""
        images = _files(Path(self.data_root) / "images" / self.split, image_extensions())
        labels = _files(Path(self.data_root) / "labels" / self.split, (".png",))
        alone = sorted(set(labels) - set(images))
        if alone:
            raise ValueError(
                f"{len(alone)} label maps in {self.data_root}/labels/{self.split} have no image, "
                f"e.g. {alone[0]}.png; expected an image of that name in images/{self.split}"
            )
        if not labels:
            raise FileNotFoundError(
                f"no label maps in {self.data_root}/labels/{self.split}; expected PNG files with "
                "the names of the images"
            )
        unlabelled = sorted(set(images) - set(labels))
        if unlabelled:
            print_log(
                f"{len(unlabelled)} of {len(images)} images in {self.data_root}/images/"
                f"{self.split} have no label map and are left out, e.g. {unlabelled[0]}",
                logger="current",
                level=logging.WARNING,
            )
        return [
            {
                "img_path": images[name],
                "seg_map_path": labels[name],
                "label_map": self.label_map,
                "reduce_zero_label": self.reduce_zero_label,
                "seg_fields": [],
            }
            for name in sorted(labels)
        ]


def _read_classes(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected the names of the classes, one a line")
    with open_text(path) as file:
        names = tuple(line.strip() for line in text_lines(file, path))
    return tuple(name for name in names if name)


def _files(folder: Path, extensions: tuple[str, ...]) -> dict[str, str]:
    try:
        return files_by_name(folder, extensions)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; see the layout of SegmentationFolder") from error
