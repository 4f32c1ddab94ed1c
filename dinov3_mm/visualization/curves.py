"""Curves of a run: losses against iterations, evaluation scores against minutes of training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from dinov3_mm.evaluation.records import RECORD_FILE, read_records

from .figures import COLOURS, saved_figure


def read_scalars(path: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Series (steps, values) by name from a JSON-lines log, or from all logs of a work directory.

    Every line is an object with ``step`` or ``iter`` and any numbers; the other entries are left
    out. A resumed run begins a new log and logs some steps again: the last value of a step counts.
    An unfinished last line is left out.
    """
    path = Path(path)
    logs = sorted(path.glob("*/vis_data/scalars.json")) if path.is_dir() else [path]
    series: dict[str, dict[int, float]] = {}
    for line in (line for log in logs for line in log.read_text().split("\n")[:-1]):
        entry = json.loads(line)
        step = entry.get("step", entry.get("iter"))
        if step is None:
            continue
        for name, value in entry.items():
            numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
            if numeric and name not in ("step", "iter", "epoch"):
                series.setdefault(name, {})[step] = float(value)
    result = {}
    for name, points in series.items():
        steps = np.array(sorted(points))
        result[name] = steps, np.array([points[step] for step in steps])
    return result


def plot_curves(
    log: str | Path,
    output: str | Path,
    names: Sequence[str] | None = None,
    *,
    smoothing: float = 0.02,
    title: str = "",
) -> list[str]:
    """Draw one panel per logged series against the iteration; the drawn names are returned.

    Args:
        log: JSON-lines file, or the work directory of a run.
        output: PNG to write.
        names: series to draw; by default every one whose name contains ``loss`` and no ``weight``.
        smoothing: deviation of the centred Gaussian mean drawn over the raw values, as a share of
            the number of points; 0 draws the values alone.
        title: above the panels.

    Raises:
        ValueError: if the log has none of the series.
    """
    series = read_scalars(log)
    if names is None:
        names = [name for name in series if "loss" in name and "weight" not in name]
        names.sort(key=lambda name: (name.split("/")[-1] != "loss", name))
    missing = [name for name in names if name not in series]
    if missing or not names:
        raise ValueError(f"{log} has no series {missing or 'with losses'}; it has {sorted(series)}")
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    with saved_figure(output, (4.2 * columns, 3.0 * rows + (0.3 if title else 0))) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, name in zip(axes, names):
            _draw_series(axis, name, *series[name], smoothing)
        for axis in axes[len(names) :]:
            axis.set_axis_off()
        if title:
            figure.suptitle(title)
    return list(names)


def points_vs_minutes(
    runs: str | Path | Mapping[str, str | Path],
    output: str | Path,
    *,
    evaluation: str = "knn",
    score: str = "cls_top1_k10",
    label: str | None = None,
    references: Mapping[str, float] | None = None,
) -> None:
    """Draw a score of the evaluation hooks against minutes of training, one line per run.

    Args:
        runs: work directory or record file of a run, or several by their names in the legend.
        output: PNG to write.
        evaluation: which hook's records: ``'knn'``, ``'dense'`` or ``'retrieval'``.
        score: entry of the records.
        label: of the vertical axis; by default the names of evaluation and score.
        references: horizontal lines by name, such as baselines; the chance level that the records
            carry is always drawn.

    Raises:
        ValueError: if a run has no such records, or they lack the score.
    """
    if not isinstance(runs, Mapping):
        runs = {Path(runs).stem: runs}
    with saved_figure(output, (6.4, 4.2)) as figure:
        axis = figure.subplots()
        levels = dict(references or {})
        for name, path in runs.items():
            records = _records(Path(path), evaluation, score)
            minutes = [record["seconds"] / 60 for record in records]
            values = [record[score] for record in records]
            axis.plot(minutes, values, marker="o", markersize=5, label=name)
            axis.annotate(
                f"{values[-1]:.1f}", (minutes[-1], values[-1]), xytext=(6, 0),
                textcoords="offset points", va="center",
            )  # fmt: skip
            chance = "chance_miou" if evaluation == "dense" else "chance"
            if chance in records[-1]:
                levels["chance"] = records[-1][chance]
        for index, (name, level) in enumerate(levels.items()):
            style = ("--", ":", "-.", (0, (5, 1)), (0, (1, 1)))[index % 5]
            axis.axhline(level, color="0.45", linestyle=style, linewidth=1.3, label=name)
        axis.set_xlabel("minutes of training")
        axis.set_ylabel(label or f"{evaluation} {score.replace('_', ' ')} (%)")
        axis.set_ylim(bottom=0)
        axis.margins(x=0.08)
        axis.legend(loc="best")


def _records(path: Path, evaluation: str, score: str) -> list[dict]:
    path = path / RECORD_FILE if path.is_dir() else path
    records = read_records(path, evaluation)
    if not records:
        raise ValueError(f"{path} has no records of the evaluation {evaluation!r}")
    if score not in records[0]:
        raise ValueError(
            f"records of {evaluation!r} have no {score!r}; they have {list(records[0])}"
        )
    return records


def smoothed(values: np.ndarray, width: float) -> np.ndarray:
    """Centred Gaussian mean of deviation ``width`` points; non-finite values carry no weight."""
    reach = min(int(4 * width), len(values) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    finite = np.isfinite(values)
    # The full convolution cut to the series: mode "same" would follow the longer of the two.
    total = np.convolve(np.where(finite, values, 0.0), kernel)[reach : reach + len(values)]
    weight = np.convolve(finite.astype(float), kernel)[reach : reach + len(values)]
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 1e-12)


def _draw_series(
    axis: Axes, name: str, steps: np.ndarray, values: np.ndarray, smoothing: float
) -> None:
    width = smoothing * len(values)
    smooth = width >= 1  # fewer points are a curve by themselves
    axis.plot(steps, values, color=COLOURS[0], alpha=0.3 if smooth else 1.0, linewidth=1.2)
    if smooth:
        axis.plot(steps, smoothed(values, width), color=COLOURS[0])
    axis.set_title(name)
    axis.set_xlabel("iteration")
