"""Depth maps looked at before a training: units, ranges and what was measured.

A map in the wrong unit, one of a sensor that measured nothing, or truth that the head cannot reach
trains without a word. Here depths, as the run will see them, are held against the ranges of the
head and the metric.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .depth import LoadDepthMap, is_saturated, read_depth_map
from .images import BrokenImageError
from .label_audit import Chosen, Refused, Report, check_size, judge_files, step_of

# Of a map, this many measured pixels at most, evenly spread, go into the quantiles.
_PIXELS_OF_A_MAP = 4096
# Units in a metre: metres, centimetres, KITTI, millimetres, TUM RGB-D, tenths of a millimetre.
_SCALES = (1, 100, 256, 1000, 5000, 10000)
# Shares of pixels beyond a range that are an error and a warning; shares of the range below which
# all truth lies, the same.
_MOST, _SOME = 0.5, 0.01
_TINY, _SMALL = 1 / 200, 1 / 20
# Of how many times the range other units are the likelier cause.
_FAR = 20
_WHITE = 255


@dataclass
class Range:
    """Depths that a head can give or a metric counts.

    Attributes:
        low, high: the ends.
        option: what sets the upper end in the config.
        is_aligned: whether scale and shift of an image do not matter, so units do not.
    """

    low: float
    high: float
    option: str
    is_aligned: bool = False


@dataclass
class DepthFacts:
    """Depths of a set.

    Attributes:
        name: of the set.
        chosen: which maps.
        pixels, measured, saturated, white: numbers of pixels: all, those with a depth, those of
            65535 in 16 bits, those of 255 in 8 bits.
        depths: some measured depths of each map.
        empty: files without a measured pixel.
        scales: the ``depth_scale`` of the samples.
        first: the first file by name.
    """

    name: str
    chosen: Chosen
    pixels: int = 0
    measured: int = 0
    saturated: int = 0
    white: int = 0
    depths: list[np.ndarray] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    broken: Refused = field(default_factory=Refused)
    wrong: Refused = field(default_factory=Refused)
    scales: set[float] = field(default_factory=set)
    first: str = ""
    replaced: bool = True


def look_at_depths(
    name: str, dataset: Any, *, zero_is_valid: bool, max_maps: int, max_seconds: float
) -> DepthFacts | None:
    """The facts about the depth maps of a set; None if its samples have none.

    Args:
        name: of the set, for messages.
        dataset: data set with ``depth_map_path`` or ``gt_depth_map``, or a wrapper.
        zero_is_valid: whether 0 is a depth.
        max_maps, max_seconds: see :class:`~dinov3_mm.datasets.label_audit.Chosen`.
    """
    chosen = Chosen(dataset, max_maps, max_seconds)
    facts, found = DepthFacts(name, chosen), False
    for owner, sample in chosen:
        if "gt_depth_map" not in sample and "depth_map_path" not in sample:
            continue
        found = True
        step = step_of(owner, LoadDepthMap)
        facts.replaced &= step.unreadable.broken == "replace"
        path = str(sample.get("depth_map_path", sample.get("img_path")))
        try:
            _add_map(facts, step, sample, path, zero_is_valid)
        except BrokenImageError as error:
            facts.broken.add(path, error)
        except ValueError as error:
            facts.wrong.add(path, error)
    return facts if found else None


def _add_map(
    facts: DepthFacts, step: LoadDepthMap, sample: dict, path: str, zero_is_valid: bool
) -> None:
    if "gt_depth_map" in sample:
        depth = np.asarray(sample["gt_depth_map"])
    else:
        stored = read_depth_map(path)
        check_size(sample, stored, path)
        depth = step.depth(stored, sample["depth_scale"])
        facts.scales.add(float(sample["depth_scale"]))
        facts.saturated += 0 if step.saturation_is_depth else int(is_saturated(stored).sum())
        facts.white += int((stored == _WHITE).sum()) if stored.dtype == np.uint8 else 0
    facts.first = min(facts.first or path, path)
    with np.errstate(invalid="ignore"):
        measured = depth[np.isfinite(depth) & ((depth >= 0) if zero_is_valid else (depth > 0))]
    facts.pixels += depth.size
    facts.measured += measured.size
    if measured.size:
        facts.depths.append(measured[:: -(-measured.size // _PIXELS_OF_A_MAP)])
    else:
        facts.empty.append(path)


def judge_depths(
    facts: DepthFacts, ranges: Sequence[Range], *, is_training: bool, nodata_is_depth: bool = False
) -> Report:
    """Hold the depths of a set against the range of the head, or those of the metrics.

    Args:
        facts: of the set.
        ranges: see :class:`Range`.
        is_training: whether the model trains on the set, or is scored on it.
        nodata_is_depth: whether what stands for 'not measured' counts as a depth.
    """
    report, name, chosen = Report(), facts.name, facts.chosen
    replaced = facts.replaced and is_training
    judge_files(report, name, chosen, facts.broken, facts.wrong, replaced=replaced)
    if not facts.pixels:
        return report
    nothing = ""
    if facts.saturated:
        share = facts.saturated / facts.pixels
        nothing = f", {share:.1%} are 65535 in 16 bits, taken for nothing measured"
        if nodata_is_depth:
            report.errors.append(
                f"{name}: {share:.1%} of the pixels are 65535 in 16 bits, nothing measured, and "
                "would count as a depth of 0: set nodata_depth=-1 of LoadDepthMap"
            )
    if not facts.measured:
        report.errors.append(
            f"{name}: {chosen} hold no measured pixel{nothing}, first {facts.first}; look at the "
            "maps: 0 means nothing measured"
        )
        return report
    depths = np.concatenate(facts.depths)
    low, middle, high = np.quantile(depths, (0.01, 0.5, 0.99)).tolist()
    scale = f" with depth_scale={_plain(facts.scales)}" if facts.scales else ""
    report.notes.append(
        f"depths of {name}: {chosen} looked at, {low:.4g} to {high:.4g}, median {middle:.4g}"
        f"{scale}; {facts.measured / facts.pixels:.1%} of the pixels measured{nothing}"
    )
    if facts.empty:
        effect = "they teach nothing" if is_training else "they do not count in the score"
        report.warnings.append(
            f"{name}: {len(facts.empty)} of {chosen.seen} maps hold no measured pixel, first "
            f"{min(facts.empty)}: {effect}"
        )
    if facts.white > _SOME * facts.pixels:
        report.warnings.append(
            f"{name}: {facts.white / facts.pixels:.1%} of the pixels are 255 in 8 bits; if that "
            "means nothing measured, set nodata=255 of LoadDepthMap"
        )
    for each in ranges:
        _judge_range(report, facts, depths, each, is_training=is_training)
    return report


def _judge_range(
    report: Report, facts: DepthFacts, depths: np.ndarray, range_: Range, *, is_training: bool
) -> None:
    beyond = float((depths >= range_.high).mean())
    inside = float(((depths > range_.low) & (depths < range_.high)).mean())
    low, middle, high = np.quantile(depths, (0.01, 0.5, 0.99)).tolist()
    what = "the head can give" if is_training else "the metric counts"
    found = (
        f"{facts.name}: depths are {low:.4g} to {high:.4g}, median {middle:.4g}, first "
        f"{facts.first}; {what} {range_.low:g} to {range_.high:g}"
    )
    advice = _advice(facts, middle, high, range_)
    is_worthless = beyond > _MOST if is_training else inside < 1 - _MOST
    if range_.is_aligned:
        if not is_training and inside == 0:
            report.errors.append(f"{found}: no pixel counts; {advice}")
        return
    if is_worthless:
        report.errors.append(f"{found}: {max(beyond, 1 - inside):.1%} are outside; {advice}")
    elif high < _TINY * range_.high:
        report.errors.append(f"{found}: all lie in the lowest {_TINY:.1%} of it; {advice}")
    elif beyond > _SOME:
        effect = "which it cannot reach" if is_training else "which do not count"
        report.warnings.append(f"{found}: {beyond:.1%} are deeper, {effect}; {advice}")
    elif high < _SMALL * range_.high:
        report.warnings.append(f"{found}: all lie in the lowest {_SMALL:.0%} of it; {advice}")


def _advice(facts: DepthFacts, middle: float, high: float, range_: Range) -> str:
    """What to set, the likelier first: the range, or a unit in which the depths would fill it."""
    wider = f"set {range_.option} to the range of the data"
    own = facts.scales.copy().pop() if len(facts.scales) == 1 else 0.0
    fitting = [
        f"depth_scale={scale} (median {middle * own / scale:.3g})"
        for scale in _SCALES
        if scale != own
        and high * own / scale <= range_.high
        and middle * own / scale > _SMALL * range_.high
    ]
    if not fitting:
        return wider
    unit = f"{' or '.join(fitting)} of the data set in place of {own:g}"
    if range_.high / _FAR < high < range_.high * _FAR:
        return f"{wider}, or if the unit is another, {unit}"
    return f"the unit seems another: set {unit}; or {wider}"


def _plain(scales: set[float]) -> str:
    return ", ".join(f"{scale:g}" for scale in sorted(scales))
