"""The classes of the data sets and the outputs of a model must be the same."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from dinov3_mm.datasets.class_names import (
    ClassNameError,
    classes_of,
    follow_classes,
    labels_of,
    parts_of,
    place_of,
    stored_metainfo,
)
from dinov3_mm.models.wrapping import unwrapped

# Images that are in training and validation: more files than this are not looked at; up to so many
# are compared whatever their names; and how much of each is read.
_MOST_FILES, _MOST_READ, _COMPARED_BYTES = 200_000, 20_000, 1 << 14


@HOOKS.register_module()
class ClassCheckHook(Hook):
    """Matches the classes of all data sets by name, and ends a run that the rest cannot fit.

    For classifiers and segmentors; detectors have
    :func:`~dinov3_mm.engine.config.coco.settle_objects`. Validation gets the labels of training by
    name, whatever its folders are; a run that goes on from a checkpoint keeps the order of the
    outputs that are stored there; a test follows its checkpoint. On a GPU a label beyond the last
    output is an assertion in a kernel, without the label: numbers are looked at before the first
    step. Images that are in training and validation are counted and said. Of label maps only the
    names are looked at, see ``LabelCheckHook``.

    Args:
        strict: refuse a head with more outputs than there are classes. False says so: it trains,
            and some outputs are of nothing.

    Raises:
        ClassNameError: if validation or test have images of a class that training has not, or a
            resumed run has other classes than its checkpoint.
        ValueError: if a data set has another number of classes than ``head.num_classes`` or the
            preprocessor's, a label beyond them, images of a single class, or validation images of
            a class without training images.
    """

    # Before the hooks that look at labels.
    priority = "HIGHEST"

    def __init__(self, *, strict: bool = True) -> None:
        self.strict = strict
        self._stored: dict[str, Any] = {}

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Keep the names of the outputs."""
        self._stored = stored_metainfo(checkpoint)

    def before_train(self, runner) -> None:
        """Check training and validation data."""
        training = runner.train_dataloader.dataset
        where = f"train_dataloader.dataset{place_of(training)}"
        lines = self._follow_checkpoint(runner, training, where)
        names = classes_of(training)
        labels = _checked_labels(runner, training, where)
        lines += _check_training(names, labels, where)
        lines += _check_count(runner, "train", names, strict=self.strict)
        if runner.val_loop is not None:
            loader = runner.val_loop.dataloader
            lines += _check_validation(runner, loader.dataset, training, labels)
            if not names:
                found = classes_of(loader.dataset)
                lines += _check_count(runner, "val", found, strict=self.strict)
            _tell(runner, getattr(runner.val_loop, "evaluator", None), loader.dataset)
        for line in lines:
            runner.logger.info(line)

    def before_test(self, runner) -> None:
        """Check test data."""
        loop = runner.test_loop
        follow_stored(runner, loop, self._stored)
        dataset = loop.dataloader.dataset
        _checked_labels(runner, dataset, f"test_dataloader.dataset{place_of(dataset)}")
        for line in _check_count(runner, "test", classes_of(dataset), strict=self.strict):
            runner.logger.info(line)

    def _follow_checkpoint(self, runner, training: Any, where: str) -> list[str]:
        """Keep the outputs of a checkpoint where training goes on from it."""
        stored, found = tuple(self._stored.get("classes") or ()), classes_of(training)
        if not stored or not found or stored == found:
            return []
        if set(stored) == set(found):
            return follow_classes(training, stored, owner="the checkpoint", where=where)
        only = [sorted(set(a) - set(b))[:5] for a, b in ((stored, found), (found, stored))]
        if runner._resume:
            raise ClassNameError(
                f"the checkpoint that this run goes on from was trained on other classes: only "
                f"there {only[0]}, only in {where} {only[1]}. Give the data their names back, or "
                "begin a new run"
            )
        return [
            f"WARNING: the checkpoint that this run starts from was trained on other classes (only "
            f"there {only[0]}, only here {only[1]}): outputs of its head mean others"
        ]


def follow_stored(runner, loop: Any, stored: dict[str, Any]) -> list[str]:
    """Give the data set of a test the classes that a checkpoint stores, by name; lines, logged.

    Raises:
        ClassNameError: see :func:`~dinov3_mm.datasets.class_names.follow_classes`.
    """
    dataset = loop.dataloader.dataset
    lines = follow_classes(
        dataset,
        tuple(stored.get("classes") or ()),
        owner="the checkpoint",
        where=f"test_dataloader.dataset{place_of(dataset)}",
        palette=stored.get("palette") or (),
    )
    _tell(runner, getattr(loop, "evaluator", None), dataset)
    for line in lines:
        runner.logger.info(line)
    return lines


def _check_training(names: Sequence[str], labels: np.ndarray | None, where: str) -> list[str]:
    if labels is None:
        return []
    counts = np.bincount(labels, minlength=len(names))
    if np.count_nonzero(counts) < 2:
        only = names[int(counts.argmax())] if names else int(counts.argmax())
        raise ValueError(
            f"all {len(labels)} images of {where} are of one class, {only!r}: a classifier needs "
            "two. Expected one folder a class directly below that folder"
        )
    empty = [name for name, count in zip(names, counts) if not count]
    if not empty:
        return []
    return [f"WARNING: {where} has no image of {_some(empty)}: an output that is never trained"]


def _check_validation(
    runner, validation: Any, training: Any, labels: np.ndarray | None
) -> list[str]:
    where = f"val_dataloader.dataset{place_of(validation)}"
    names, found = classes_of(training), classes_of(validation)
    if names and not found and labels_of(validation) is not None:
        raise ClassNameError(
            f"the training data name their classes ({_some(names)}) and {where} has numbers only: "
            "they cannot be matched; give it metainfo=dict(classes=[...]) in the order of its "
            "numbers"
        )
    lines = follow_classes(validation, names, owner="the training set", where=where)
    validated = _checked_labels(runner, validation, where)
    if labels is None or validated is None:
        return lines
    unseen = np.setdiff1d(validated, labels)
    if len(unseen):
        counts = np.bincount(validated)
        listed = [
            f"{(names[n] if names else str(n))!r} ({counts[n]} images)" for n in unseen.tolist()
        ]
        raise ClassNameError(
            f"{where} has images of classes that have no training image: {_some(listed)}. Nothing "
            "is learnt of them; add training images, or take them out of both"
        )
    return lines + _same_files(training, validation, labels, validated)


def _checked_labels(runner, dataset: Any, where: str) -> np.ndarray | None:
    """Labels of a data set, each of them an output of the head."""
    labels = labels_of(dataset)
    outputs = len(classes_of(dataset)) or _outputs(runner, "head")
    if labels is None or outputs is None:
        return labels
    wrong = np.flatnonzero((labels < 0) | (labels >= outputs))
    if len(wrong):
        index = int(wrong[0])
        path = next(path for n, path in enumerate(_paths(dataset)) if n == index)
        raise ValueError(
            f"{where}: {len(wrong)} of {len(labels)} images have labels that are no classes, first "
            f"{path} with {labels[index]}; expected 0 to {outputs - 1}. Correct its list, or name "
            "all classes in metainfo.classes and set model.head.num_classes"
        )
    return labels


def _outputs(runner, part: str) -> int | None:
    model = unwrapped(runner.model)
    return getattr(getattr(model, part, None), "num_classes", None)


def _check_count(runner, split: str, classes: tuple[str, ...], *, strict: bool) -> list[str]:
    """Hold the number of classes against that of outputs; lines for the log."""
    lines = []
    for part in ("head", "data_preprocessor"):
        outputs = _outputs(runner, part)
        if not classes or outputs in (None, len(classes)):
            continue
        text = (
            f"{split}_dataloader.dataset has {len(classes)} classes ({_some(classes)}), but "
            f"model.{part}.num_classes is {outputs}: set model.{part}.num_classes={len(classes)}"
        )
        if strict or outputs < len(classes):
            raise ValueError(text)
        lines.append(f"WARNING: {text}")
    return lines


def _tell(runner, evaluator: Any, dataset: Any) -> None:
    """Give names in a new order to what has read them already."""
    metainfo = getattr(dataset, "metainfo", None)
    for reader in (evaluator, getattr(runner, "visualizer", None)):
        if metainfo and reader is not None:
            reader.dataset_meta = metainfo


def _same_files(
    training: Any, validation: Any, labels: np.ndarray, validated: np.ndarray
) -> list[str]:
    """A warning of validation images that are training images too, links or copies."""
    total = len(labels) + len(validated)
    if not is_main_process() or total > _MOST_FILES:
        return []

    def traits(path: str) -> tuple | None:
        try:
            size = os.stat(path).st_size
        except OSError:  # behind another backend, or not there
            return None
        return (size, os.path.basename(path) if total > _MOST_READ else "")

    known = defaultdict(list)
    for number, path in enumerate(_paths(training)):
        known[traits(path)].append((number, path))
    known.pop(None, None)
    contents: dict[tuple, dict[bytes, tuple[int, str]]] = {}
    found = []
    for number, path in enumerate(_paths(validation)):
        alike = traits(path)
        if alike not in known:
            continue
        if alike not in contents:
            contents[alike] = {_digest(other[1]): other for other in known[alike]}
        twin = contents[alike].get(_digest(path))
        if twin is not None:
            found.append((path, twin[1], labels[twin[0]] == validated[number]))
    if not found:
        return []
    unlike = sum(not same for _, _, same in found)
    path, twin, _ = found[0]
    return [
        f"WARNING: {len(found)} of {len(validated)} validation images are training images too"
        + (f", {unlike} of them of another class there" if unlike else "")
        + f", e.g. {path} is {twin}: the score says less about new images"
    ]


def _digest(path: str) -> bytes:
    """Of the end of a file, where images of equal headers and sizes differ."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _COMPARED_BYTES))
        return hashlib.blake2b(file.read(), digest_size=16).digest()


def _paths(dataset: Any) -> Iterable[str]:
    """Paths of all samples, in their order."""
    return chain.from_iterable(
        (
            str(BaseDataset.get_data_info(part, index).get("img_path", ""))
            for index in range(len(part))
        )
        for part in parts_of(dataset)
    )


def _some(classes: Sequence[str]) -> str:
    return ", ".join(map(str, classes[:3])) + (", ..." if len(classes) > 3 else "")
