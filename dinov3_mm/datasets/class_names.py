"""Classes of several data sets matched by name.

Folders and lists number their classes each for itself: where one lacks a class, has one more (even
an empty folder), or spells one otherwise, the same number means another class, and a score of 100
becomes 0. Here one set says the numbers (that of training, or a checkpoint), the others follow it
by name (:func:`map_classes`, :func:`follow_classes`), and what differs is named.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset

from dinov3_mm.errors import nearest

# Names that a message lists before it only counts.
_SHOWN = 8
IGNORED_LABEL = 255


class ClassNameError(ValueError):
    """Classes that cannot be matched by name; the message is for the author of the data."""


def map_classes(
    classes: Sequence[str],
    found: Sequence[str],
    *,
    owner: str,
    where: str,
    counts: Sequence[int] | None = None,
    leave_out: bool = False,
    what: str = "images",
) -> tuple[list[int], list[str]]:
    """Number in ``classes`` of each of the names ``found``.

    Args:
        classes: names in the order of the numbers that hold.
        found: names of another data set, in its own order.
        owner: what ``classes`` belong to, for messages, such as 'the checkpoint'.
        where: what ``found`` belong to, such as 'val_dataloader.dataset'.
        counts: samples of each of ``found``; None counts as some.
        leave_out: samples of a name that is in no class can be left out, and that is said. Else
            such a name is refused: no prediction for its samples can be right.
        what: the samples, in the plural.

    Returns:
        Numbers in the order of ``found``, -1 for what is left out; and lines for the log.

    Raises:
        ClassNameError: a name with samples that is in no class, with the nearest name; or, of names
            that may be left out, one that is nearly that of a class that is missing; or no name in
            common.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    some = [True] * len(found) if counts is None else [count > 0 for count in counts]
    names = set(found)
    missing = [name for name in classes if name not in names]
    extra = [name for name in found if name not in numbers]
    filled = [name for name, is_filled in zip(found, some) if is_filled and name not in numbers]
    near = {name: nearest(name, missing) for name in filled}
    if leave_out and len(extra) < len(found):
        refused = [name for name in filled if near[name] is not None]
    else:
        refused = filled
    if refused:
        number_of = dict(zip(found, counts or ()))
        listed = [_described(name, number_of.get(name), what, near[name]) for name in refused]
        raise ClassNameError(
            f"{where} has {_some(listed)}; {owner} has no such class. Labels are matched by name: "
            f"write it alike on both sides, or take these {what} out. Classes of {owner}: "
            f"{_some(classes)}; here: {_some(found)}"
        )
    lines = []
    empty = [name for name in extra if name not in filled]
    if empty:
        lines.append(
            f"{where}: {_some(map(repr, empty))} has no {what} and is no class of {owner}: passed "
            "over"
        )
    if filled:
        lines.append(
            f"WARNING: {where}: {what} of {_some(map(repr, filled))} are left out: {owner} has "
            "no such class"
        )
    present = {name for name, is_filled in zip(found, some) if is_filled}
    absent = [name for name in classes if name not in present]
    if absent:
        lines.append(f"{where} has no {what} of {_some(map(repr, absent))}: without a score there")
    return [numbers.get(name, -1) for name in found], lines


def stored_classes(checkpoint: Mapping) -> tuple[str, ...]:
    """Names of the outputs of a trained model, from its checkpoint; none if it does not say them.

    Args:
        checkpoint: content of a file that MMEngine's runner wrote, or an older one.
    """
    return tuple(stored_metainfo(checkpoint).get("classes") or ())


def stored_metainfo(checkpoint: Mapping) -> dict[str, Any]:
    """What a checkpoint says of the data that it was trained on, under keys in lower case."""
    meta = checkpoint.get("meta") or {}
    stated = meta.get("dataset_meta") or {k: meta[k] for k in ("CLASSES", "PALETTE") if k in meta}
    return {str(key).lower(): value for key, value in stated.items()}


def place_of(dataset: Any) -> str:
    """Where the entries of a data set come from, in brackets for messages; empty if unknown."""
    part = parts_of(dataset)[0]
    prefix = getattr(part, "data_prefix", None) or {}
    prefix = prefix if isinstance(prefix, Mapping) else {}
    places = (getattr(part, "ann_file", ""), *prefix.values(), getattr(part, "data_root", ""))
    place = next((place for place in places if place), "")
    return f" ({place})" if place else ""


def classes_of(dataset: Any) -> tuple[str, ...]:
    """Names of the classes of a data set of MMEngine's kind or of a source; none if not stated."""
    metainfo = getattr(dataset, "metainfo", None)
    names = metainfo.get("classes") if isinstance(metainfo, Mapping) else None
    return tuple(names or getattr(dataset, "classes", None) or ())


def labels_of(dataset: Any) -> np.ndarray | None:
    """Class of every sample (N,) of a data set of MMEngine's kind, wrapped or not.

    Samples are not loaded. None where the entries hold no single label, or are not to be had.
    """
    labels = []
    for part in parts_of(dataset):
        if not isinstance(part, BaseDataset):
            return None
        part.full_init()
        for index in range(len(part)):
            label = BaseDataset.get_data_info(part, index).get("gt_label")
            if label is None or isinstance(label, Mapping) or np.ndim(label) != 0:
                return None
            labels.append(int(label))
    return np.array(labels, np.int64)


def follow_classes(
    dataset: Any, classes: Sequence[str], *, owner: str, where: str, palette: Sequence = ()
) -> list[str]:
    """Give a data set the numbers of ``classes``, by name; its entries change in place.

    For the images of a classifier, the label maps of a segmentor and the boxes of a detector. Of
    the latter two, what is of no class is left out.

    Args:
        dataset: of MMEngine's kind, wrapped or not.
        classes: names in the order of the outputs.
        owner, where: see :func:`map_classes`.
        palette: colours of ``classes``; by default those of the data set.

    Returns:
        Lines for the log; none where names and order are the same.

    Raises:
        ClassNameError: see there; or the numbers of this kind of data set cannot be changed.
    """
    found = classes_of(dataset)
    if not found or not classes or tuple(found) == tuple(classes):
        return []
    parts = parts_of(dataset)
    for part in parts:
        if not isinstance(part, BaseDataset):
            raise ClassNameError(
                f"{where} has the classes {_some(found)}, {owner} has {_some(classes)}; they are "
                f"matched by name, and the labels of a {type(part).__name__} cannot be changed: "
                "give it the same classes in the same order, such as the same class folders"
            )
    labels, is_dense = labels_of(dataset), _is_dense(dataset)
    counts = None if labels is None else np.bincount(labels, minlength=len(found)).tolist()
    numbers, lines = map_classes(
        classes,
        found,
        owner=owner,
        where=where,
        counts=counts,
        leave_out=is_dense,
        what="objects or pixels" if is_dense else "images",
    )
    for part in parts:
        _renumber(part, numbers, where)
    for part in (*parts, *_wrappers(dataset)):
        _set_metainfo(part, classes, numbers, palette)
    lines.append(f"{where}: classes are numbered by name as those of {owner}: {_some(classes)}")
    return lines


def _renumber(dataset: BaseDataset, numbers: Sequence[int], where: str) -> None:
    """Change the labels in the entries of a data set."""
    dataset.full_init()
    entries = []
    for index in range(len(dataset)):
        entry = BaseDataset.get_data_info(dataset, index)
        del entry["sample_idx"]
        entries.append(_renumbered(entry, numbers, dataset, where))
    dataset.data_list = entries
    if dataset.serialize_data:
        dataset.data_bytes, dataset.data_address = dataset._serialize_data()


def _renumbered(entry: dict, numbers: Sequence[int], dataset: Any, where: str) -> dict:
    if "gt_label" in entry:
        return {**entry, "gt_label": numbers[int(entry["gt_label"])]}
    if "seg_map_path" in entry:
        _refuse_shifted(entry, dataset, where)
        stored = entry.get("label_map") or {number: number for number in range(len(numbers))}
        new = [IGNORED_LABEL if number < 0 else number for number in numbers]
        moved = {old: new[label] if label < len(new) else label for old, label in stored.items()}
        return {**entry, "label_map": moved}
    if "instances" in entry:
        boxes = [
            {**box, "bbox_label": numbers[box["bbox_label"]]}
            for box in entry["instances"]
            if numbers[box["bbox_label"]] >= 0
        ]
        return {**entry, "instances": boxes}
    raise ClassNameError(
        f"{where}: the labels of a {type(dataset).__name__} cannot be matched by name; give it the "
        "classes of training in the same order"
    )


def _refuse_shifted(entry: Mapping, dataset: Any, where: str) -> None:
    """mmseg's own loading of label maps takes 0 away after it has mapped labels, ours before."""
    steps = [type(step).__name__ for step in getattr(dataset.pipeline, "transforms", ())]
    if entry.get("reduce_zero_label") and "LoadLabelMap" not in steps:
        raise ClassNameError(
            f"{where}: with reduce_zero_label its classes are matched by name only where "
            "LoadLabelMap reads the label maps, in place of mmseg's LoadAnnotations"
        )


def _set_metainfo(
    dataset: Any, classes: Sequence[str], numbers: Sequence[int], palette: Sequence
) -> None:
    metainfo = getattr(dataset, "_metainfo", None)
    if metainfo is None:
        return
    own = metainfo.get("palette")
    if palette and len(palette) == len(classes):
        metainfo["palette"] = copy.deepcopy(list(palette))
    elif own and len(own) == len(numbers):
        colours = dict(zip(numbers, own))
        metainfo["palette"] = [colours.get(number, [0, 0, 0]) for number in range(len(classes))]
    metainfo["classes"] = tuple(classes)


def _is_dense(dataset: Any) -> bool:
    part = parts_of(dataset)[0]
    entry = BaseDataset.get_data_info(part, 0) if len(part) else {}
    return "seg_map_path" in entry or "instances" in entry


def parts_of(dataset: Any) -> list[Any]:
    """The data sets inside wrappers."""
    if hasattr(dataset, "datasets"):
        return [part for each in dataset.datasets for part in parts_of(each)]
    inner = getattr(dataset, "dataset", None)
    return [dataset] if inner is None else parts_of(inner)


def _wrappers(dataset: Any) -> Iterable[Any]:
    inner = list(getattr(dataset, "datasets", ())) or [getattr(dataset, "dataset", None)]
    if inner != [None]:
        yield dataset
        for part in inner:
            yield from _wrappers(part)


def _described(name: str, count: int | None, what: str, near: str | None) -> str:
    facts = [] if count is None else [f"{count} {what}"]
    facts += [] if near is None else [f"nearest {near!r}"]
    return f"{name!r} ({'; '.join(facts)})" if facts else repr(name)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
