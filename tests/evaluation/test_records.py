"""The training clock and the record file of a run that is killed and resumed."""

import pytest

from dinov3_mm.evaluation import records


@pytest.fixture
def now(monkeypatch):
    """A clock that the test moves by hand."""
    time = [100.0]
    monkeypatch.setattr(records.time, "perf_counter", lambda: time[0])
    return time


def test_clock_leaves_out_evaluations(now):
    clock = records.TrainingClock()
    with clock.paused():  # before training starts
        now[0] += 5
    clock.start()
    now[0] += 10
    clock.start()  # a second hook
    with clock.paused():
        now[0] += 7
        with clock.paused():
            now[0] += 1
        now[0] += 1
        assert clock.seconds == 10
    now[0] += 2
    assert clock.seconds == 12


def test_clock_continues_after_a_resume(now):
    clock = records.TrainingClock()
    clock.restore(60.0)
    clock.start()
    now[0] += 3
    assert clock.seconds == 63.0


def test_records_survive_a_kill_and_the_last_of_a_step_counts(tmp_path):
    path = tmp_path / "run" / "evaluations.jsonl"
    assert records.read_records(path) == []
    for step, value in ((0, 1.0), (10, 2.0)):
        records.append_record(path, {"name": "knn", "step": step, "top1": value})
    with path.open("a") as file:
        file.write('{"name": "knn", "st')  # killed while writing
    assert [record["step"] for record in records.read_records(path)] == [0, 10]
    records.append_record(path, {"name": "dense", "step": 10, "miou": 3.0})
    records.append_record(path, {"name": "knn", "step": 10, "top1": 2.5})
    knn = records.read_records(path, "knn")
    assert [record["top1"] for record in knn] == [1.0, 2.5]
    assert len(records.read_records(path)) == 3


def test_a_damaged_record_is_named(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    path.write_text('{"name": "knn", "step": 0}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2"):
        records.read_records(path)
