"""Objects in COCO's format: files read strictly, classes matched by name.

mmdet's data set and metric number the classes by their place in the annotation file and the outputs
by their place in the config. Where the two orders differ, or ids do not ascend, predictions carry
wrong names and a score of 0.78 stays 0.78. Here a file is first brought into the order of the
config's names (:meth:`CocoFile.in_order_of`), with ids that ascend with them, and then given to
mmdet (:mod:`dinov3_mm.datasets.named_coco`).
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinov3_mm.errors import nearest

# Names that a message lists before it only counts.
_SHOWN = 5


class AnnotationError(ValueError):
    """An annotation file that cannot be used as it is; the message is for its author."""


@dataclass
class CocoFile:
    """An annotation file whose every entry can be used.

    Attributes:
        path: the file.
        images: entries with ``id``, ``file_name``, ``width`` and ``height``.
        categories: name of each category by its id, ids ascending.
        annotations: boxes with an area inside their image.
        left_out: annotation ids by the reason for which they are missing in ``annotations``.
    """

    path: Path
    images: list[dict]
    categories: dict[int, str]
    annotations: list[dict]
    left_out: dict[str, list] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the categories in the order of their ids."""
        return tuple(self.categories.values())

    def counts(self) -> Counter:
        """Number of boxes by name of the category."""
        return Counter(self.categories[each["category_id"]] for each in self.annotations)

    def remarks(self) -> list[str]:
        """A line for each reason for which boxes are left out."""
        total = len(self.annotations) + sum(map(len, self.left_out.values()))
        return [
            f"{self.path}: {len(ids)} of {total} boxes left out, {reason} "
            f"(annotations {_listed(ids)})"
            for reason, ids in self.left_out.items()
        ]

    def in_order_of(self, classes: Sequence[str]) -> dict[str, Any]:
        """The file's content with the categories ``classes``, numbered from 1 in their order.

        Boxes of other categories are dropped; a class that the file lacks has no boxes.
        """
        number = {name: 1 + label for label, name in enumerate(classes)}
        annotations = [
            {**each, "category_id": number[name]}
            for each in self.annotations
            if (name := self.categories[each["category_id"]]) in number
        ]
        categories = [{"id": id_, "name": name} for name, id_ in number.items()]
        return {"images": self.images, "annotations": annotations, "categories": categories}


def read_coco(path: str | os.PathLike) -> CocoFile:
    """Read an annotation file.

    Ids written as strings of digits become numbers. A missing ``area`` is the box's, a missing
    ``iscrowd`` is 0. Boxes without an area or outside their image are left out and counted: neither
    can be found, so training must not see them and a score must not count them.

    Args:
        path: a JSON file with ``images``, ``annotations`` and ``categories``.

    Raises:
        AnnotationError: the file is not there, is no JSON or not COCO's; or an entry has no usable
            id, size, category or box. The message names file and entry.
    """
    path = Path(path)
    content = _parsed(path)
    images = [_image(path, entry) for entry in content["images"]]
    _refuse_twice(path, "images", (entry["id"] for entry in images))
    categories = _categories(path, content["categories"])
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in images}
    kept: list[dict] = []
    left_out: dict[str, list] = {}
    for entry in content["annotations"]:
        entry = _annotation(path, entry, sizes, categories)
        reason = _why_not(entry["bbox"], *sizes[entry["image_id"]])
        if reason is None:
            kept.append(entry)
        else:
            left_out.setdefault(reason, []).append(entry["id"])
    _refuse_twice(path, "annotations", (entry["id"] for entry in kept))
    return CocoFile(path, images, categories, kept, left_out)


def _parsed(path: Path) -> dict[str, list]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise AnnotationError(f"there is no annotation file {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AnnotationError(f"{path} is no readable JSON file: {error}") from error
    found = sorted(content) if isinstance(content, dict) else type(content).__name__
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise AnnotationError(
                f"{path} is no COCO file of objects: expected lists 'images', 'annotations' and "
                f"'categories', found {found}"
            )
    if not content["images"]:
        raise AnnotationError(f"{path} lists no images")
    return content


def _image(path: Path, entry: Mapping) -> dict:
    entry = dict(entry)
    where = f"{path}, image {entry.get('id')!r} ({entry.get('file_name')!r})"
    entry["id"] = _number(entry.get("id"), f"{where}: id")
    if not isinstance(entry.get("file_name"), str):
        raise AnnotationError(f"{where}: file_name is missing")
    for side in ("width", "height"):
        entry[side] = _number(entry.get(side), f"{where}: {side}")
    return entry


def _categories(path: Path, entries: Sequence[Mapping]) -> dict[int, str]:
    names: dict[int, str] = {}
    for entry in entries:
        number = _number(entry.get("id"), f"{path}, category {entry.get('name')!r}: id")
        if not isinstance(entry.get("name"), str):
            raise AnnotationError(f"{path}, category {number}: name is missing")
        if number in names:
            raise AnnotationError(
                f"{path}: the categories {names[number]!r} and {entry['name']!r} have one id, "
                f"{number}"
            )
        names[number] = entry["name"]
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        ids = [number for number, name in names.items() if name == twice[0]]
        raise AnnotationError(
            f"{path}: the category {twice[0]!r} is there {len(ids)} times, with ids "
            f"{_listed(ids)}; give it one id"
        )
    if not names:
        raise AnnotationError(f"{path} lists no categories")
    return dict(sorted(names.items()))


def _annotation(
    path: Path, entry: Mapping, sizes: Mapping[int, tuple], categories: Mapping[int, str]
) -> dict:
    entry = dict(entry)
    where = f"{path}, annotation {entry.get('id')!r}"
    for key in ("id", "image_id", "category_id"):
        entry[key] = _number(entry.get(key), f"{where}: {key}")
    if entry["image_id"] not in sizes:
        raise AnnotationError(f"{where}: the file has no image with id {entry['image_id']}")
    if entry["category_id"] not in categories:
        raise AnnotationError(f"{where}: the file has no category with id {entry['category_id']}")
    box = entry.get("bbox")
    if not (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, (int, float)) and math.isfinite(v) for v in box)
    ):
        found = "is missing" if box is None else f"is {box!r}"
        raise AnnotationError(
            f"{where}: bbox {found}; expected [left, top, width, height] in pixels"
        )
    if not isinstance(entry.get("area"), (int, float)):
        entry["area"] = box[2] * box[3]
    entry["iscrowd"] = int(entry.get("iscrowd") or 0)
    return entry


def _why_not(box: Sequence[float], width: int, height: int) -> str | None:
    left, top, box_width, box_height = box
    if box_width <= 0 or box_height <= 0:
        return "without an area"
    if min(left + box_width, width) <= max(left, 0) or min(top + box_height, height) <= max(top, 0):
        return "outside their image"
    return None


def _number(value: Any, what: str) -> int:
    """A whole number, also where an exporter wrote it as text."""
    try:
        if isinstance(value, bool) or int(value) != float(value):
            raise ValueError
        return int(value)
    except (TypeError, ValueError, OverflowError):
        found = "is missing" if value is None else f"is {value!r}"
        raise AnnotationError(f"{what} {found}; expected a whole number") from None


def _refuse_twice(path: Path, kind: str, ids: Iterable[int]) -> None:
    twice = [number for number, count in Counter(ids).items() if count > 1]
    if twice:
        raise AnnotationError(f"{path}: several {kind} have the same id: {_listed(twice)}")


def _listed(values: Sequence) -> str:
    shown = ", ".join(map(str, values[:_SHOWN]))
    return shown + (f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else "")


# ---------------------------------------------------------------------------------------------
# Names of config and file


def check_classes(classes: Any, where: str) -> tuple[str, ...]:
    """Names that a config gives.

    Args:
        classes: what the config holds.
        where: its path, for messages.

    Raises:
        AnnotationError: a single string, no name at all, or a name twice.
    """
    if isinstance(classes, str):
        raise AnnotationError(
            f"{where} is the text {classes!r}; expected a list of names, such as ({classes!r},)"
        )
    classes = tuple(classes)
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice or not classes:
        found = f"names {twice[0]!r} twice" if twice else "is empty"
        raise AnnotationError(f"{where} {found}")
    return classes


def compare_names(classes: Sequence[str], file: CocoFile, *, is_training: bool) -> list[str]:
    """Hold the classes of a run against the categories of a file, by name.

    Args:
        classes: names of the run.
        file: a file that it trains on or is scored on.
        is_training: a class without a category in it cannot be learnt, and is refused. In a file
            for scoring it stays without a score.

    Returns:
        Remarks: categories that are left out, and classes without a box.

    Raises:
        AnnotationError: a class that the training file lacks; two names that differ so little that
            they are likely to mean the same; no name in common.
    """
    counts = file.counts()
    missing = [name for name in classes if name not in file.names]
    extra = [name for name in file.names if name not in classes]
    doubtful = [(name, near) for name in missing if (near := nearest(name, extra)) is not None]
    if doubtful:
        pairs = ", ".join(f"{ours!r} and {theirs!r}" for ours, theirs in doubtful)
        raise AnnotationError(
            f"the run has a class and {file.path} a category that may be the same: {pairs}; write "
            f"them alike. Classes of the run: {_listed(classes)}; categories of the file: "
            f"{_listed(file.names)}"
        )
    if missing and (is_training or len(missing) == len(classes)):
        raise AnnotationError(
            f"{file.path} has no category {_listed([repr(name) for name in missing])}; its "
            f"categories are {_listed(file.names)}, the run has the classes {_listed(classes)}"
        )
    lines = []
    if missing:
        lines.append(
            f"WARNING: {file.path} has no category {_listed(missing)}: without a score there"
        )
    if extra:
        boxes = sum(counts[name] for name in extra)
        lines.append(
            f"WARNING: {file.path}: {boxes} boxes of {_listed(extra)} are left out, because the "
            "config's classes do not name them"
        )
    empty = [name for name in classes if name in file.names and not counts[name]]
    if empty:
        lines.append(f"WARNING: {file.path} has no box of {_listed(empty)}")
    return lines
