"""Names, order and retention of a run's files."""

import multiprocessing

import pytest

from dinov3_mm.engine.run_files import (
    checkpoint_path,
    export_path,
    find_latest_checkpoint,
    list_checkpoints,
    list_exports,
    occupied,
    remove_partial_files,
    surplus,
)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_newest_checkpoint_is_the_highest_complete_one(tmp_path):
    assert find_latest_checkpoint(tmp_path) is None
    for iteration in (90, 1000, 123456789):
        touch(checkpoint_path(tmp_path, iteration))
    half_written = touch(tmp_path / "checkpoints" / ".iter_00002000.pth.0a1b.partial")
    touch(tmp_path / "checkpoints" / "iter_5.pth")  # somebody else's
    assert list(list_checkpoints(tmp_path)) == [90, 1000, 123456789]
    assert find_latest_checkpoint(tmp_path).name == "iter_123456789.pth"
    assert remove_partial_files(tmp_path) == [half_written]
    assert not half_written.exists()


def test_exports_are_listed_without_the_latest(tmp_path):
    touch(export_path(tmp_path, 7))
    touch(tmp_path / "exports" / "teacher_latest.safetensors")
    assert list(list_exports(tmp_path)) == [7]


@pytest.mark.parametrize(
    "max_to_keep, keep_every, deleted",
    [
        (None, None, []),
        (3, None, [10, 20]),
        (1, None, [10, 20, 30, 40]),
        (9, None, []),
        (1, 20, [10, 30]),
        (2, 20, [10]),
    ],
)
def test_retention(tmp_path, max_to_keep, keep_every, deleted):
    files = {n: tmp_path / str(n) for n in (50, 10, 20, 30, 40)}
    assert surplus(files, max_to_keep, keep_every) == [files[n] for n in deleted]


def _occupy(folder, ready, done):
    with occupied(folder):
        ready.set()
        done.wait()


def test_one_training_at_a_time_writes_into_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_occupy, args=(tmp_path / "run", ready, done))
    other.start()
    ready.wait()
    words = f"another training writes into .*process {other.pid} on .*give another --work-dir"
    with pytest.raises(ValueError, match=words), occupied(tmp_path / "run"):
        pass
    done.set()
    other.join()
    for _ in range(2):
        with occupied(tmp_path / "run"):
            pass
