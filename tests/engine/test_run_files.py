"""Names, order and retention of a run's files."""

import pytest

from dinov3_mm.engine.runner.files import (
    checkpoint_path,
    export_path,
    find_latest_checkpoint,
    list_checkpoints,
    list_exports,
    remove_partial_files,
)
from dinov3_mm.engine.runner.retention import surplus


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
