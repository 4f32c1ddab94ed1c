"""Label maps looked at before a training: what would train on nothing, or score nothing.

mmseg trains on masks of 0 and 255 without a word, although 255 is 'ignore' and only background is
left. Here the values of a set's label maps are held against the classes of the model, as the run
will see them: after palettes and ``reduce_zero_label``.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dinov3_mm.datasets.images import BrokenImageError, opened, read_frame
from dinov3_mm.datasets.transforms.host_steps import ORIENTATION, LoadLabelMap, fit_map, get_bytes

IGNORED = 255
# Samples that a data set computes cost more than files, and are right by construction.
_MAX_COMPUTED = 50
_SHOWN = 5
# Share of ignored pixels from which it may be why a class is missing.
_MUCH_IGNORED = 0.01


@dataclass
class Report:
    """What an audit found.

    Attributes:
        errors: what makes the run worthless; the message is for the user.
        warnings: what is doubtful.
        notes: what was looked at.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Refused:
    """Files of a set that cannot be used, by the kind of error."""

    files: list[tuple[str, str]] = field(default_factory=list)

    def add(self, path: str, error: Exception) -> None:
        """Keep a file and what is wrong with it."""
        reason = error.reason if isinstance(error, BrokenImageError) else str(error)
        self.files.append((path, reason))

    @property
    def first(self) -> tuple[str, str]:
        """The first file by name, and what is wrong with it."""
        return min(self.files)

    def __len__(self) -> int:
        return len(self.files)


class Chosen:
    """Samples of a data set to look at: all, or some that a seed draws.

    Args:
        dataset: of MMEngine, or a wrapper around some.
        max_maps: number of samples.
        max_seconds: no sample is begun after this time.
    """

    def __init__(self, dataset: Any, max_maps: int, max_seconds: float) -> None:
        self.sets = list(_leaves(dataset))
        self.total = sum(map(len, self.sets))
        self.seen = 0
        self.max_maps = max_maps
        self.max_seconds = max_seconds

    def __iter__(self) -> Iterator[tuple[Any, dict]]:
        """Data sets and samples, before their pipeline."""
        end = time.monotonic() + self.max_seconds
        ends = np.cumsum([len(each) for each in self.sets])
        # Also where all are looked at: what the time allows is no worse a sample then.
        order = np.random.default_rng(0).permutation(self.total)[: self.max_maps]
        for number in order:
            place = int(np.searchsorted(ends, number, side="right"))
            dataset = self.sets[place]
            sample = dataset.get_data_info(int(number - ends[place] + len(dataset)))
            self.seen += 1
            yield dataset, sample
            is_computed = any(name in sample for name in ("gt_seg_map", "gt_depth_map"))
            if time.monotonic() > end or (is_computed and self.seen >= _MAX_COMPUTED):
                return

    @property
    def is_complete(self) -> bool:
        """Whether every sample was looked at."""
        return self.seen == self.total

    def __str__(self) -> str:
        if self.is_complete:
            return f"all {self.total} maps"
        return f"{self.seen} of {self.total} maps, drawn at random,"


def step_of(dataset: Any, kind: type) -> Any:
    """The first loading step of a kind in a data set's pipeline, or one with its defaults.

    A data set whose features are cached has no pipeline; whoever runs the steps of its labels keeps
    them as ``label_steps`` with it.
    """
    steps = getattr(dataset, "label_steps", None) or getattr(dataset, "pipeline", None)
    return next(_steps(steps, kind), None) or kind()


def check_size(sample: Mapping[str, Any], values: np.ndarray, path: str) -> None:
    """Raise ValueError if a map does not have the size of its image; no pixel is decoded."""
    try:
        size, orientation = read_frame(sample["img_path"])
    except (BrokenImageError, KeyError):  # of the image, or behind another file backend
        return
    is_swapped = values.shape == size[::-1] and values.shape != size
    if is_swapped and str(sample["img_path"]).lower().endswith((".tif", ".tiff")):
        return  # some are turned without saying so in their header
    frame = {"img_path": sample["img_path"], "ori_shape": size, ORIENTATION: orientation}
    fit_map(values, path, frame)


def judge_files(
    report: Report, name: str, chosen: Chosen, broken: Refused, wrong: Refused, *, replaced: bool
) -> None:
    """What files that cannot be used mean for a run.

    Args:
        report: to add to.
        name: of the set.
        chosen: what was looked at.
        broken: files that are missing or damaged.
        wrong: files that are no map of their image.
        replaced: whether the run takes other samples in place of broken ones.
    """
    if wrong:
        more = f" ({len(wrong)} of {chosen.seen} maps looked at)" if wrong.files[1:] else ""
        report.errors.append(f"{name}: {wrong.first[1]}{more}")
    if broken:
        path, reason = broken.first
        line = f"{name}: {len(broken)} of {chosen.seen} maps cannot be read, first {path}: {reason}"
        if replaced and len(broken) < chosen.seen:
            report.warnings.append(f"{line}; other samples take their place")
        else:
            report.errors.append(f"{line}; add or mend them, or take their images out")


# ---------------------------------------------------------------------------------------------
# Segmentation


@dataclass
class LabelFacts:
    """Values of the label maps of a set.

    Attributes:
        name: of the set.
        chosen: which maps.
        pixels: number of pixels by label, as the model sees it.
        stored: the same by value, as the files hold it, or by class of the palette.
        first: a file for each label.
        empty: files in which every pixel is ignored.
        uses_palette: whether labels are those of colours.
        reduced: whether 0 becomes ignored.
    """

    name: str
    chosen: Chosen
    pixels: Counter = field(default_factory=Counter)
    stored: Counter = field(default_factory=Counter)
    first: dict[int, str] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    broken: Refused = field(default_factory=Refused)
    wrong: Refused = field(default_factory=Refused)
    uses_palette: bool = False
    reduced: bool = False
    replaced: bool = True

    @property
    def labels(self) -> list[int]:
        """Labels that count, ascending."""
        return sorted(label for label in self.pixels if label != IGNORED)

    @property
    def ignored_share(self) -> float:
        """Share of the pixels that is ignored."""
        return self.pixels[IGNORED] / max(sum(self.pixels.values()), 1)

    def values(self) -> str:
        """Stored values with their share of the pixels."""
        total = max(sum(self.stored.values()), 1)
        shown = sorted(self.stored, key=lambda value: -self.stored[value])[:_SHOWN]
        parts = [f"{value} ({self.stored[value] / total:.1%})" for value in sorted(shown)]
        rest = len(self.stored) - len(shown)
        return ", ".join(parts) + (f" and {rest} more" if rest else "")


def look_at_labels(
    name: str, dataset: Any, *, max_maps: int, max_seconds: float
) -> LabelFacts | None:
    """The facts about the label maps of a set; None if its samples have none.

    Args:
        name: of the set, for messages.
        dataset: data set of mmseg, or a wrapper.
        max_maps, max_seconds: see :class:`Chosen`.
    """
    chosen = Chosen(dataset, max_maps, max_seconds)
    facts, palettes, found = LabelFacts(name, chosen), _Palettes(), False
    for owner, sample in chosen:
        if "gt_seg_map" not in sample and "seg_map_path" not in sample:
            continue
        found = True
        step = step_of(owner, LoadLabelMap)
        facts.replaced &= step.unreadable.broken == "replace"
        path = str(sample.get("seg_map_path", sample.get("img_path")))
        try:
            _add_map(facts, palettes, step, sample, path)
        except BrokenImageError as error:
            facts.broken.add(path, error)
        except ValueError as error:
            facts.wrong.add(path, error)
    return facts if found else None


def _add_map(
    facts: LabelFacts, palettes: "_Palettes", step: LoadLabelMap, sample: dict, path: str
) -> None:
    if "gt_seg_map" in sample:
        values, table = np.asarray(sample["gt_seg_map"]), np.arange(256)
    else:
        values, table = step.read(sample), step.table(sample)
        check_size(sample, values, path)
        facts.reduced |= bool(sample.get("reduce_zero_label"))
        has_colors = step.palette is not None or sample.get("label_colors") is not None
        facts.uses_palette |= has_colors
        if not has_colors:
            palettes.add(path, get_bytes(path, step.backend_args))
    counts = np.bincount(values.ravel().astype(np.uint8), minlength=256)
    present = np.flatnonzero(counts)
    for value in present.tolist():
        label = int(table[value])
        facts.stored[value] += int(counts[value])
        facts.pixels[label] += int(counts[value])
        facts.first[label] = min(facts.first.get(label, path), path)
    if (table[present] == IGNORED).all():
        facts.empty.append(path)


class _Palettes:
    """Whether the indices of paletted maps mean the same in all files.

    Programs that shrink PNG files sort the palette of each anew.
    """

    def __init__(self) -> None:
        self.index: dict[tuple[int, int, int], tuple[int, str]] = {}

    def add(self, path: str, data: bytes) -> None:
        """Compare a file with those before it; ValueError if a colour has moved."""
        if not data.startswith(b"\x89PNG"):
            return
        with opened(data) as image:
            if image.mode != "P":
                return
            colors = np.reshape(image.getpalette("RGB"), (-1, 3)).tolist()
            used = np.flatnonzero(np.bincount(np.array(image).ravel())).tolist()
        own = {index: tuple(colors[index]) for index in used if index < len(colors)}
        times = Counter(own.values())
        for index, color in own.items():
            if times[color] > 1:
                continue
            before, other = self.index.setdefault(color, (index, path))
            if before != index:
                raise ValueError(
                    f"the colour {list(color)} is label {index} in {path} and {before} in {other}: "
                    "each file has a palette of its own order. palette=[[R, G, B], ...] of "
                    "SegmentationFolder or LoadLabelMap takes their colours in place of indices"
                )


def judge_labels(
    facts: LabelFacts,
    classes: Sequence[str],
    num_classes: int,
    *,
    is_training: bool,
    trained: LabelFacts | None = None,
    ignored: int = IGNORED,
) -> Report:
    """Hold the labels of a set against the classes of a model.

    Args:
        facts: of the set.
        classes: names of the classes, for messages; none if they have no names.
        num_classes: outputs of the model.
        is_training: whether the model trains on the set, or is scored on it.
        trained: facts of the training set, if this one is for scoring.
        ignored: the label that the loss leaves out.
    """
    report, name = Report(), facts.name
    replaced = facts.replaced and is_training
    judge_files(report, name, facts.chosen, facts.broken, facts.wrong, replaced=replaced)
    if not facts.pixels:
        return report
    outside = [label for label in facts.labels if label >= num_classes and label != ignored]
    inside = [label for label in facts.labels if label < num_classes]
    report.notes.append(
        f"labels of {name}: {facts.chosen} looked at, {len(inside)} of {num_classes} classes, "
        f"{facts.ignored_share:.1%} of the pixels ignored"
    )
    of_files = f"{name}: {facts.chosen} hold the values {facts.values()}"
    if outside:
        report.errors.append(
            f"{of_files}; no class is {_listed(outside)}: the model has {num_classes}, from 0 to "
            f"{num_classes - 1}, and ignores {ignored}, first {facts.first[outside[0]]}; "
            f"{_outside_advice(facts, num_classes)}"
        )
        return report
    if not inside:
        report.errors.append(
            f"{of_files}: every pixel is ignored, first {min(facts.empty)}; "
            f"{_ignored_advice(facts, num_classes)}"
        )
        return report
    if len(inside) == 1 and num_classes > 1:
        _judge_single(report, facts, of_files, _name(inside[0], classes), num_classes, is_training)
    if facts.empty:
        report.warnings.append(
            f"{name}: in {len(facts.empty)} of {facts.chosen.seen} maps every pixel is ignored, "
            f"first {min(facts.empty)}"
        )
    if is_training:
        _judge_missing(report, facts, classes, num_classes)
    elif trained is not None:
        unknown = [label for label in inside if label not in trained.pixels]
        if unknown and trained.pixels:
            report.warnings.append(
                f"{name} holds {_listed([_name(label, classes) for label in unknown])}, first "
                f"{facts.first[unknown[0]]}, and {trained.chosen} of training hold none: what no "
                "training map shows cannot be learnt"
            )
    return report


def _judge_single(
    report: Report,
    facts: LabelFacts,
    of_files: str,
    only: str,
    num_classes: int,
    is_training: bool,
) -> None:
    what = "there is nothing to tell it from" if is_training else "the others have no score"
    line = f"{of_files}: the only class is {only}, {what}; {_ignored_advice(facts, num_classes)}"
    is_white = facts.stored[IGNORED] > 0 and num_classes == 2
    if is_white or (is_training and facts.chosen.is_complete):
        report.errors.append(line)
    else:
        report.warnings.append(line)


def _judge_missing(
    report: Report, facts: LabelFacts, classes: Sequence[str], num_classes: int
) -> None:
    missing = [label for label in range(num_classes) if label not in facts.pixels]
    if not missing or len(missing) == num_classes - 1:
        return
    why = ""
    if facts.reduced and missing == [num_classes - 1]:
        why = (
            f"; reduce_zero_label=True ignores the stored 0 ({facts.ignored_share:.1%} of the "
            "pixels) and moves the others down: set it to False if 0 is a class"
        )
    elif facts.stored[IGNORED] and facts.ignored_share > _MUCH_IGNORED and not facts.uses_palette:
        why = f"; {facts.ignored_share:.1%} of the pixels are {IGNORED}, which is ignored"
    report.warnings.append(
        f"{facts.name}: {facts.chosen} hold no pixel of "
        f"{_listed([_name(label, classes) for label in missing])}{why}"
    )


def _outside_advice(facts: LabelFacts, num_classes: int) -> str:
    values = sorted(facts.stored)
    counted = [value for value in values if value != IGNORED]
    if facts.uses_palette:
        return "give model.decode_head.num_classes and the palette as many entries as classes"
    if counted[0] == 1 and counted[-1] == num_classes:
        return (
            "the classes begin at 1: set reduce_zero_label=True in the data sets, which ignores 0 "
            "and takes 1 for the first class"
        )
    if len(values) == num_classes:
        return (
            f"the maps hold as many greys as there are classes: palette={values} of "
            "SegmentationFolder or LoadLabelMap takes them for the classes in this order"
        )
    if len(values) > 2 * num_classes + 2 and len(values) > 16:
        return (
            f"{len(values)} different values are no labels: were the maps stored as JPEG, or "
            "resized with interpolation? Make them anew, resized by nearest neighbour"
        )
    return (
        "set model.decode_head.num_classes, or reduce_zero_label=True in the data set if its 0 is "
        "unlabelled and classes begin at 1"
    )


def _ignored_advice(facts: LabelFacts, num_classes: int) -> str:
    if facts.reduced and facts.stored[0]:
        return "reduce_zero_label=True ignores the stored 0: set it to False if 0 is a class"
    if facts.stored[IGNORED] and facts.stored[0] and num_classes == 2 and not facts.uses_palette:
        return (
            "255 is ignored: palette=[0, 255] of SegmentationFolder or LoadLabelMap makes it class "
            "1, or store 1 in its place"
        )
    if facts.stored[IGNORED] and not facts.uses_palette:
        return "255 is ignored: store the number of its class where it is one"
    return "look at the label maps, or set model.decode_head.num_classes"


def _name(label: int, classes: Sequence[str]) -> str:
    return f"{label} ({classes[label]})" if label < len(classes) else str(label)


def _listed(values: Sequence) -> str:
    shown = ", ".join(map(str, values[:_SHOWN]))
    return shown + (f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else "")


def _leaves(dataset: Any) -> Iterator[Any]:
    """The data sets with samples inside wrappers."""
    inner = getattr(dataset, "datasets", None) or getattr(dataset, "dataset", None)
    if inner is not None:
        for each in inner if isinstance(inner, (list, tuple)) else [inner]:
            yield from _leaves(each)
    elif hasattr(dataset, "get_data_info"):
        yield dataset


def _steps(part: Any, kind: type) -> Iterator[Any]:
    """Steps of a kind in a pipeline, also inside those that hold others."""
    if isinstance(part, kind):
        yield part
    if isinstance(part, (list, tuple)):
        for each in part:
            yield from _steps(each, kind)
    for name in ("transforms", "subroutines"):
        inner = getattr(part, name, None)
        if inner is not None:
            yield from _steps(inner, kind)
