"""Folders of images and label maps as a data set of mmseg.

A config lists this module in ``custom_imports``.
"""

import logging
import re
from collections.abc import Sequence
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
from dinov3_mm.datasets.transforms.host_steps import Palette, as_colors  # noqa: E402

CLASS_FILE = "classes.txt"
FROM_FILE = "from_file"
# A name and three numbers, also as in class_dict.csv (name,r,g,b) and CVAT's labelmap.txt
# (name:r,g,b::).
_COLORED = re.compile(r"(.+?)\s*[:,;\s]\s*(\d+)[,;\s]+(\d+)[,;\s]+(\d+)\s*(?:[:,;].*)?")
_HEADER = re.compile(r"#.*|name\s*[,;]\s*r.*", re.IGNORECASE)


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
        palette: None, the values of the label maps are the classes; a list, they are colours: that
            of each class, [red, green, blue] or a grey, in the order of ``classes.txt``;
            'from_file', the colours stand in ``classes.txt`` behind the names: ``sky 70 130 180``,
            ``sky,70,130,180`` or ``sky:70,130,180``.
        ignored_colors: with ``palette``: colours that belong to no class.
        **kwargs: ``pipeline``, ``test_mode``, ``reduce_zero_label`` and so on of mmseg's
            ``BaseSegDataset``.

    Raises:
        FileNotFoundError: If a folder or the file of classes is missing, or no image has labels.
        ValueError: If two images have the same name, or labels lack their image.
    """

    def __init__(
        self,
        data_root: str,
        split: str,
        *,
        palette: str | Palette | None = None,
        ignored_colors: Palette = (),
        **kwargs: Any,
    ) -> None:
        self.split = split
        names = Path(data_root) / CLASS_FILE
        if isinstance(palette, str) and palette != FROM_FILE:
            raise ValueError(
                f"palette is {palette!r}; expected a list of colours, or {FROM_FILE!r}"
            )
        self.colors = None
        metainfo: dict[str, Any] = {}
        if names.is_file() or not kwargs.get("lazy_init", False):
            metainfo["classes"] = _read_classes(names)
            if palette == FROM_FILE:
                metainfo["classes"], palette = _split_colors(metainfo["classes"], names)
            if palette is not None:
                self.colors = as_colors(palette, ignored_colors)
                metainfo["palette"] = _drawn(palette, metainfo["classes"], names)
        super().__init__(data_root=str(data_root), metainfo=metainfo or None, **kwargs)

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
                **({} if self.colors is None else {"label_colors": self.colors}),
            }
            for name in sorted(labels)
        ]


def _read_classes(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected the names of the classes, one a line")
    with open_text(path) as file:
        names = tuple(line.strip() for line in text_lines(file, path))
    return tuple(name for name in names if name)


def _split_colors(
    lines: Sequence[str], path: Path
) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
    """Names and colours of the lines of a class file."""
    found = [(line, _COLORED.fullmatch(line)) for line in lines if not _HEADER.fullmatch(line)]
    wrong = [line for line, match in found if match is None]
    if wrong:
        raise ValueError(
            f"palette='from_file': {path} has no colour in {wrong[0]!r}; expected lines such as "
            "'sky 70 130 180', a name and red, green, blue from 0 to 255"
        )
    names = tuple(match[1] for _, match in found)
    return names, [tuple(int(part) for part in match.groups()[1:]) for _, match in found]


def _drawn(palette: Palette, classes: Sequence[str], path: Path) -> list[list[int]]:
    """The colours in which results are drawn; ValueError unless each class has one."""
    if len(palette) != len(classes):
        raise ValueError(
            f"palette has {len(palette)} colours, {path} {len(classes)} classes; give each class "
            "one, in their order; what belongs to no class goes into ignored_colors"
        )
    return [[entry] * 3 if isinstance(entry, int) else list(entry) for entry in palette]


def _files(folder: Path, extensions: tuple[str, ...]) -> dict[str, str]:
    try:
        return files_by_name(folder, extensions)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; see the layout of SegmentationFolder") from error
