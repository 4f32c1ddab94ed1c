"""Going back: a run that leaves the line of checkpoints in its work folder begins a new branch.

::

    work_dir/branch.json                             where the newest branch left the old line
    work_dir/abandoned/001_after_iter_00000020/      what lay beyond, in folders as before:
        checkpoints/ exports/ captures/ evaluations.jsonl TIME/vis_data/scalars.json

A branch begins where a checkpoint is resumed (``--resume PATH``) that is not the newest of the work
folder or lies elsewhere, and where a run starts anew in a folder that has checkpoints. Nothing is
deleted. The record is written before the first file moves, and again after the last: whenever the
process dies, ``--resume`` goes on from the branch point.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.logging import print_log

from dinov3_mm.checkpoints.io import atomic_write
from dinov3_mm.engine.config import ConfigError

from .files import (
    ABANDONED,
    BRANCH_FILE,
    Branch,
    checkpoints_folder,
    find_latest_checkpoint,
    latest_files,
    list_checkpoints,
    point_latest_to,
    read_branch,
    record_latest,
    remove,
)

_NUMBER = re.compile(r"iter_(\d{8,})")
_FINISHED = ("checkpoints/iter_*", "exports/iter_*", "exports/*/iter_*")
# Named after the step that failed, counted from 0: the first of a branch is its iteration.
_CAPTURES = ("captures/iter_*", "students/*/captures/iter_*")
_RECORDS = ("evaluations.jsonl", "students/*/evaluations.jsonl", "*/vis_data/scalars.json")


def resume_point(
    work_dir: str | Path, asked: str | Path | None = None, *, may_lie_elsewhere: bool = True
) -> Path | None:
    """Checkpoint from which a run in this folder goes on.

    Args:
        work_dir: work folder of the run.
        asked: the checkpoint that the command line names. A job that Slurm has queued again goes on
            with what it saved since it went back to that checkpoint.
        may_lie_elsewhere: without a checkpoint of its own the run goes on from the one of another
            folder with which its branch began.

    Returns:
        ``asked``, else the newest checkpoint, else where the branch began, else None.

    Raises:
        ConfigError: the branch began with a checkpoint that is gone.
    """
    branch = read_branch(work_dir)
    if asked is not None:
        if branch is None or not _has_begun(branch, Path(work_dir), Path(asked)):
            return Path(asked)
        if is_main_process():
            print_log(
                f"this job was queued again: it goes on with its newest checkpoint, not from "
                f"{asked}, where its branch began"
            )
    newest = find_latest_checkpoint(work_dir)
    if newest is not None or branch is None or branch.origin is None or not may_lie_elsewhere:
        return newest
    origin = branch.origin_in(work_dir)
    if not origin.exists():
        raise ConfigError(
            f"--resume: {work_dir} has no checkpoint of its own yet; its run went on from {origin},"
            " which is gone. Give a checkpoint with --resume PATH, or leave --resume out to start "
            "anew"
        )
    return origin


def begin_branch(work_dir: str | Path, iteration: int, origin: str | Path | None) -> str | None:
    """Set aside what does not belong to the run that begins, and remember where it came from.

    To be called in one process, after the checkpoint has been read and before a step is done.

    Args:
        work_dir: work folder of the run.
        iteration: optimizer steps done.
        origin: checkpoint that was resumed, None for a run that starts anew.

    Returns:
        A line about what was set aside and where, None if there was nothing.
    """
    work_dir = Path(work_dir)
    is_inside = origin is not None and _is_inside(Path(origin), work_dir)
    last_kept = iteration if is_inside else -1
    beyond = [number for number in list_checkpoints(work_dir) if number > last_kept]
    earlier = read_branch(work_dir)
    branch = Branch(iteration, _stored(origin, work_dir), job=_job(), folder=None)
    if not beyond and (earlier is None or earlier.is_settled):
        # What Slurm queues again asks for the same checkpoint again.
        may_be_asked_again = branch.job is not None and not _is_queued_again()
        if origin is not None and (not is_inside or may_be_asked_again):
            _write(work_dir, branch)
        return None
    branch = replace(branch, is_settled=False, folder=_place(work_dir, branch, earlier))
    _write(work_dir, branch)
    target = work_dir / branch.folder
    _set_aside(work_dir, target, last_kept)
    record_latest(work_dir)
    _write(work_dir, replace(branch, is_settled=True))
    moved = sorted(list_checkpoints(target))
    if origin is None:
        what = "a new run starts in a work folder that has checkpoints"
    elif is_inside:
        what = f"back to iteration {iteration}"
    else:
        what = f"goes on from {origin}, which is not of this work folder"
    span = f" ({moved[0]} to {moved[-1]})" if moved else ""
    return (
        f"{what}: {len(moved)} checkpoint(s){span} were set aside in {target}, with their exports, "
        "captures, metrics and evaluations. Nothing was deleted; remove that folder when you no "
        "longer need it"
    )


def _has_begun(branch: Branch, work_dir: Path, asked: Path) -> bool:
    """Whether this job has gone back to a checkpoint already, before Slurm queued it again."""
    if branch.origin is None or branch.job is None or not _is_queued_again():
        return False
    return branch.job == _job() and branch.origin_in(work_dir).resolve() == asked.resolve()


def _job() -> str | None:
    return os.environ.get("SLURM_JOB_ID")


def _is_queued_again() -> bool:
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def _is_inside(checkpoint: Path, work_dir: Path) -> bool:
    return checkpoint.resolve().parent == checkpoints_folder(work_dir).resolve()


def _stored(origin: str | Path | None, work_dir: Path) -> str | None:
    """The checkpoint as the record names it: relative where the work folder may move with it."""
    if origin is None:
        return None
    path = Path(origin)
    return f"checkpoints/{path.name}" if _is_inside(path, work_dir) else str(path.resolve())


def _write(work_dir: Path, branch: Branch) -> None:
    with atomic_write(work_dir / BRANCH_FILE) as partial:
        partial.write_text(json.dumps(asdict(branch), indent=1) + "\n")


def _place(work_dir: Path, branch: Branch, earlier: Branch | None) -> str:
    """Folder for what is set aside: that of the same move if it was interrupted, or a new one."""
    is_same = earlier is not None and not earlier.is_settled
    if is_same and (earlier.iteration, earlier.origin) == (branch.iteration, branch.origin):
        return earlier.folder
    folder = work_dir / ABANDONED
    taken = [path.name.split("_")[0] for path in folder.iterdir()] if folder.is_dir() else []
    number = max((int(name) for name in taken if name.isdigit()), default=0) + 1
    return f"{ABANDONED}/{number:03d}_after_iter_{branch.iteration:08d}"


def _set_aside(work_dir: Path, target: Path, last_kept: int) -> None:
    """Move everything of later iterations; may be repeated after it was interrupted."""
    exports = {path.parent for path in work_dir.glob("exports/**/teacher_latest*")}
    later = [*_beyond(work_dir, _FINISHED, last_kept), *_beyond(work_dir, _CAPTURES, last_kept - 1)]
    for path in later:
        _move(path, work_dir, target)
    for folder in exports:
        _settle_latest(folder, work_dir, target)
    for pattern in _RECORDS:
        for path in [*work_dir.glob(pattern)]:
            _split(path, target / path.relative_to(work_dir), last_kept)


def _beyond(work_dir: Path, patterns: tuple[str, ...], last_kept: int) -> Iterator[Path]:
    for pattern in patterns:
        for path in sorted(work_dir.glob(pattern)):
            match = _NUMBER.match(path.name)
            if match and int(match[1]) > last_kept:
                yield path


def _move(path: Path, work_dir: Path, target: Path) -> None:
    place = target / path.relative_to(work_dir)
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists() or place.is_symlink():
        remove(place)  # a copy to another file system that was interrupted
    shutil.move(path, place)


def _settle_latest(folder: Path, work_dir: Path, target: Path) -> None:
    """``teacher_latest`` is the newest export that is left; without one it is set aside too."""
    left = [path for path in folder.glob("iter_*_teacher*") if path.suffix != ".json"]
    if left:
        point_latest_to(max(left))
        return
    for path in latest_files(folder):
        _move(path, work_dir, target)


def _split(path: Path, place: Path, last_kept: int) -> None:
    """Move the lines of later steps out of a file of JSON lines."""
    kept, later = [], []
    # A killed run may have left its last line unfinished.
    for line in path.read_text().split("\n")[:-1]:
        entry = json.loads(line)
        step = entry.get("step", entry.get("iter"))
        (kept if step is None or step <= last_kept else later).append(line)
    if not later:
        return
    for file, lines in ((place, later), (path, kept)):
        with atomic_write(file) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines))
