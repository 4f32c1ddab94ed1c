"""Curves: what is read from the logs of a killed and resumed run, and that it is drawn."""

import json

import numpy as np
import pytest
from PIL import Image

from dinov3_mm.evaluation.records import append_record
from dinov3_mm.visualization.curves import plot_curves, points_vs_minutes, read_scalars, smoothed


@pytest.fixture
def log(tmp_path):
    lines = [{"step": s, "loss": 5 - s / 50, "ibot_loss": 2.0, "lr": 0.1} for s in range(0, 100, 2)]
    lines += [{"step": 90, "loss": 9.0}, {"step": 100, "eval/knn_cls_top1_k10": 40.0, "note": "x"}]
    lines += [{"step": 50, "gram_loss_weight": 1.0, "flag": True}, {"host": 3}]
    path = tmp_path / "scalars.json"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 102, "lo')
    return path


def test_read_scalars(log):
    series = read_scalars(log)
    assert set(series) == {"loss", "ibot_loss", "lr", "eval/knn_cls_top1_k10", "gram_loss_weight"}
    steps, values = series["loss"]
    assert steps.tolist() == list(range(0, 100, 2))
    assert values[steps == 90].item() == 9.0  # the resumed run's value
    assert values[0] == 5.0


def test_smoothing_keeps_lines_and_skips_nans():
    line = np.linspace(3, 7, 200)
    np.testing.assert_allclose(smoothed(line, 5)[40:-40], line[40:-40], atol=1e-9)
    noisy = line + np.random.default_rng(0).normal(size=200)
    assert np.abs(smoothed(noisy, 8) - line).std() < 0.35
    noisy[50] = np.nan
    assert np.isfinite(smoothed(noisy, 8)).all()
    assert smoothed(np.full(4, 2.0), 50).tolist() == pytest.approx([2.0] * 4)


def test_plot_curves_draws_the_losses(log, tmp_path):
    output = tmp_path / "curves.png"
    assert plot_curves(log, output, title="run") == ["loss", "ibot_loss"]
    assert _ink(output) > 0.01
    assert plot_curves(log, output, ["lr"]) == ["lr"]
    with pytest.raises(ValueError, match=r"no series \['nothing'\].*ibot_loss"):
        plot_curves(log, output, ["nothing"])
    empty = tmp_path / "empty.json"
    empty.write_text('{"step": 1, "lr": 0.1}\n')
    with pytest.raises(ValueError, match="no series with losses"):
        plot_curves(empty, output)


def _ink(path) -> float:
    return (np.asarray(Image.open(path).convert("L")) < 200).mean()


def test_points_against_minutes(tmp_path):
    for run in ("a", "b"):
        for step in (0, 100, 200):
            record = {"name": "knn", "step": step, "seconds": 0.6 * step, "chance": 8.0}
            record["cls_top1_k10"] = 10 + step / 5
            append_record(tmp_path / run / "evaluations.jsonl", record)
    output = tmp_path / "points.png"
    points_vs_minutes(tmp_path / "a", output)
    one = _ink(output)
    runs = {"first": tmp_path / "a", "second": tmp_path / "b" / "evaluations.jsonl"}
    points_vs_minutes(runs, output, references={"raw pixels": 30.0})
    assert _ink(output) > one > 0.005
    with pytest.raises(ValueError, match="no records of the evaluation 'dense'"):
        points_vs_minutes(runs, output, evaluation="dense")
    with pytest.raises(ValueError, match="no 'top1'; they have"):
        points_vs_minutes(runs, output, score="top1")


def test_work_directory_joins_the_logs_of_a_resumed_run(tmp_path):
    for name, steps in (("20260101_000000", (1, 2, 3)), ("20260101_010000", (3, 4))):
        folder = tmp_path / name / "vis_data"
        folder.mkdir(parents=True)
        lines = [json.dumps({"step": step, "loss": len(steps) * 10 + step}) for step in steps]
        (folder / "scalars.json").write_text("\n".join(lines) + "\n")
    steps, values = read_scalars(tmp_path)["loss"]
    assert steps.tolist() == [1, 2, 3, 4] and values.tolist() == [31, 32, 23, 24]
