"""Going back in a work folder: what is set aside, what a requeued job goes on from."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from dinov3_mm.engine import run_files as branches
from dinov3_mm.engine.config import ConfigError
from dinov3_mm.engine.hooks import PretrainCheckpointHook
from dinov3_mm.engine.run_files import (
    begin_branch,
    checkpoint_path,
    export_path,
    find_latest_checkpoint,
    latest_export_path,
    list_checkpoints,
    list_exports,
    point_latest_to,
    read_branch,
    resume_point,
)

STEPS = (10, 20, 30, 40)
SCALARS = "20260101_000000/vis_data/scalars.json"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def lines(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.fixture(params=["file", "shards"])
def run(request, tmp_path) -> Path:
    """Work folder of a run of 40 steps with all that a run leaves."""
    work = tmp_path / "work"
    sharded = request.param == "shards"
    for step in STEPS:
        path = checkpoint_path(work, step, sharded=sharded)
        write(path / "state.pth" if sharded else path, f"checkpoint {step}")
        export = export_path(work, step)
        write(export.with_suffix(".json"), f"json {step}")
        if sharded:
            export = export.with_suffix("")
        write(export / "model.safetensors" if sharded else export, f"export {step}")
        point_latest_to(export)
    for step in (19, 20, 31):
        write(work / "captures" / f"iter_{step:08d}.pt", f"capture {step}")
    metrics = "".join(json.dumps({"loss": 1.0, "step": step}) + "\n" for step in range(1, 41))
    write(work / SCALARS, metrics + '{"unfinished')
    write(work / "evaluations.jsonl", '{"name": "knn", "step": 0}\n{"name": "knn", "step": 25}\n')
    write(work / "last_checkpoint", str(path))
    return work


def origin(run: Path, step: int = 20) -> Path:
    return list_checkpoints(run)[step]


def contents(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.rglob("iter_*") if path.is_file()} | {
        path.read_text() for path in folder.rglob("state.pth")
    }


def test_what_is_later_is_set_aside_and_nothing_is_lost(run):
    before = contents(run)
    line = begin_branch(run, 20, origin(run))
    aside = run / "abandoned" / "001_after_iter_00000020"
    assert line == (
        f"back to iteration 20: 2 checkpoint(s) (30 to 40) were set aside in {aside}, with their "
        "exports, captures, metrics and evaluations. Nothing was deleted; remove that folder when "
        "you no longer need it"
    )
    assert list(list_checkpoints(run)) == list(list_exports(run)) == [10, 20]
    assert list(list_checkpoints(aside)) == list(list_exports(aside)) == [30, 40]
    assert contents(run) == before
    # Captures are named after the step that failed, counted from 0.
    assert [path.name for path in (run / "captures").iterdir()] == ["iter_00000019.pt"]
    assert lines(run / SCALARS) == list(range(1, 21))
    assert lines(aside / SCALARS) == list(range(21, 41))
    assert lines(run / "evaluations.jsonl") == [0]
    assert lines(aside / "evaluations.jsonl") == [25]
    assert (run / "last_checkpoint").read_text() == str(origin(run))
    latest = latest_export_path(run)
    latest = latest / "model.safetensors" if latest.is_dir() else latest
    assert latest.read_text() == "export 20"
    assert (run / "exports" / "teacher_latest.json").read_text() == "json 20"


def test_the_newest_checkpoint_begins_no_branch(run):
    assert begin_branch(run, 40, origin(run, 40)) is None
    assert list(list_checkpoints(run)) == list(STEPS)
    assert not (run / "branch.json").exists()


def test_a_second_branch_has_a_folder_of_its_own(run):
    begin_branch(run, 20, origin(run))
    write(checkpoint_path(run, 30), "checkpoint 30 of the new branch")
    begin_branch(run, 20, origin(run))
    names = sorted(path.name for path in (run / "abandoned").iterdir())
    assert names == ["001_after_iter_00000020", "002_after_iter_00000020"]
    assert list(list_checkpoints(run)) == [10, 20]


@pytest.mark.parametrize("moves", range(10))
def test_killed_while_files_move(run, monkeypatch, moves):
    """The branch point is what a run goes on from; then the rest is moved to the same place."""
    before, done = contents(run), []

    def dying(action):
        def act(*arguments):
            if len(done) == moves:
                raise KeyboardInterrupt
            done.append(action(*arguments))

        return act

    for name in ("_move", "_split"):
        monkeypatch.setattr(branches, name, dying(getattr(branches, name)))
    with pytest.raises(KeyboardInterrupt):
        begin_branch(run, 20, origin(run))
    monkeypatch.undo()
    assert find_latest_checkpoint(run) == resume_point(run) == origin(run)
    begin_branch(run, 20, resume_point(run))
    assert [path.name for path in (run / "abandoned").iterdir()] == ["001_after_iter_00000020"]
    assert list(list_checkpoints(run)) == list(list_exports(run)) == [10, 20]
    assert contents(run) == before
    assert read_branch(run).is_settled


def test_a_run_that_starts_anew_sets_all_aside(run):
    line = begin_branch(run, 0, None)
    assert line.startswith(
        "a new run starts in a work folder that has checkpoints: 4 checkpoint(s)"
    )
    assert list_checkpoints(run) == list_exports(run) == {}
    assert resume_point(run) is None
    assert not (run / "last_checkpoint").exists()
    assert not list((run / "exports").glob("teacher_latest*"))


def test_a_checkpoint_of_another_folder_is_remembered_until_the_first_save(run, tmp_path):
    other = write(tmp_path / "other" / "checkpoints" / "iter_00000015.pth", "elsewhere")
    line = begin_branch(run, 15, other)
    assert line.startswith(f"goes on from {other}, which is not of this work folder: 4 check")
    assert list_checkpoints(run) == {}
    # Killed before it saved: queued again with --resume.
    assert resume_point(run) == other.resolve()
    assert begin_branch(run, 15, resume_point(run)) is None
    # A stage starts from the stage before it, whatever that has saved since.
    assert resume_point(run, may_lie_elsewhere=False) is None
    own = write(checkpoint_path(run, 20), "own")
    assert resume_point(run) == own
    own.unlink()
    other.unlink()
    with pytest.raises(ConfigError, match=r"went on from .*iter_00000015.pth, which is gone"):
        resume_point(run)


def test_the_branch_point_moves_with_the_work_folder(run, tmp_path):
    begin_branch(run, 20, origin(run))
    copy = shutil.copytree(run, tmp_path / "copy", symlinks=True)
    shutil.rmtree(run)
    assert resume_point(copy) == origin(copy)


def test_a_job_that_slurm_queues_again_stays_on_its_branch(run, monkeypatch, capsys):
    """Slurm repeats the command, and with it ``--resume PATH``."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    asked = origin(run)
    assert resume_point(run, asked) == asked
    begin_branch(run, 20, asked)
    new = write(checkpoint_path(run, 30), "checkpoint 30 of the new branch")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert resume_point(run, asked) == new
    assert f"not from {asked}, where its branch began" in capsys.readouterr().out
    assert begin_branch(run, 30, new) is None
    assert new.exists()
    # Queued again a second time.
    assert resume_point(run, asked) == new
    # Another job, or another checkpoint, is meant as it is said.
    assert resume_point(run, origin(run, 10)) == origin(run, 10)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert resume_point(run, asked) == asked


def test_queued_again_after_going_on_from_the_newest_by_name(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    asked = origin(run, 40)
    assert begin_branch(run, 40, asked) is None
    new = write(checkpoint_path(run, 50), "checkpoint 50")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert resume_point(run, asked) == new


def test_a_validation_beside_the_run_moves_nothing(run):
    cfg = {"work_dir": str(run), "cfg": {}, "iter": 0, "train_loop": {"type": "PretrainLoop"}}
    half = write(run / "checkpoints" / ".iter_00000050.pth.0a1b.partial", "being written")
    PretrainCheckpointHook().before_run(SimpleNamespace(**cfg))
    assert list(list_checkpoints(run)) == list(STEPS)
    assert half.exists()
