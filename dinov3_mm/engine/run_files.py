"""Where a pretraining run keeps its files, which of them may go, and what happens on going back."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.logging import print_log

from dinov3_mm.checkpoints.io import PARTIAL_SUFFIX, atomic_write
from dinov3_mm.errors import ConfigError

# --- Where a pretraining run keeps its files, and which of them may go ---
#
# ::
#
#     work_dir/checkpoints/iter_00001000.pth          everything a resume needs, or
#     work_dir/checkpoints/iter_00001000/             the same in shards
#     work_dir/exports/iter_00001000_teacher.safetensors + .json    the teacher backbone, for users
#     work_dir/exports/teacher_latest.safetensors + .json           the newest of them
#     work_dir/exports/NAME/...                       the same of each student of several
#     work_dir/last_checkpoint                        path of the newest checkpoint, for MMEngine
#     work_dir/branch.json, abandoned/...             where the run went back, and what it left:
#                                                     see :mod:`dinov3_mm.engine.run_files`
#
# An export that is too large for one file is a folder of the same name without suffix, and
# ``teacher_latest`` a link to it.


_CHECKPOINT = re.compile(r"iter_(\d{8,})(?:\.pth)?")
_EXPORT = re.compile(r"iter_(\d{8,})_teacher(?:\.safetensors)?")
_LATEST = "teacher_latest"

BRANCH_FILE = "branch.json"
ABANDONED = "abandoned"


_IN_USE = ".in_use"


@contextlib.contextmanager
def occupied(work_dir: str | Path) -> Iterator[None]:
    """Keep other processes from training into a work folder meanwhile.

    The lock is this process's own: it ends with it, however it ends, and its loader workers do not
    prolong it. Where a file system has no locks, nothing is kept.

    Raises:
        ValueError: another process does already.
    """
    os.makedirs(work_dir, exist_ok=True)
    with open(Path(work_dir) / _IN_USE, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f"another training writes into {work_dir} ({file.read().strip() or 'unknown'}): "
                "wait for its end, or give another --work-dir"
            ) from None
        except OSError:
            pass
        else:
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
            file.flush()
        yield


@dataclass(frozen=True)
class Branch:
    """Where a run left the line of checkpoints in its work folder.

    Attributes:
        iteration: optimizer steps done there.
        origin: its checkpoint, relative to the work folder if it lies there; None for a run that
            started anew.
        job: Slurm's number of the job that went back.
        folder: where the later files were set aside, relative to the work folder; None: there were
            none.
        is_settled: whether all of them have been moved.
    """

    iteration: int
    origin: str | None
    job: str | None
    folder: str | None
    is_settled: bool = True

    def origin_in(self, work_dir: str | Path) -> Path:
        """Path of the checkpoint."""
        return Path(work_dir) / self.origin


def read_branch(work_dir: str | Path) -> Branch | None:
    """The record of the newest branch, if the run ever went back."""
    path = Path(work_dir) / BRANCH_FILE
    return Branch(**json.loads(path.read_text())) if path.is_file() else None


def checkpoints_folder(work_dir: str | Path) -> Path:
    """Where the training checkpoints lie."""
    return Path(work_dir) / "checkpoints"


def checkpoint_path(work_dir: str | Path, iteration: int, *, sharded: bool = False) -> Path:
    """Checkpoint after ``iteration`` optimizer steps: a file, or a folder of shards."""
    suffix = "" if sharded else ".pth"
    return checkpoints_folder(work_dir) / f"iter_{iteration:08d}{suffix}"


def export_path(work_dir: str | Path, iteration: int, student: str | None = None) -> Path:
    """Teacher export after ``iteration`` optimizer steps, of one student if there are several."""
    return _exports(work_dir, student) / f"iter_{iteration:08d}_teacher.safetensors"


def latest_export_path(work_dir: str | Path, student: str | None = None) -> Path:
    """Copy of the newest teacher export, or the link to it where exports are folders."""
    path = _exports(work_dir, student) / f"{_LATEST}.safetensors"
    return path.with_suffix("") if path.with_suffix("").is_dir() else path


def list_checkpoints(work_dir: str | Path) -> dict[int, Path]:
    """Complete checkpoints by iteration, oldest first."""
    return _numbered_files(checkpoints_folder(work_dir), _CHECKPOINT)


def list_exports(work_dir: str | Path, student: str | None = None) -> dict[int, Path]:
    """Teacher exports by iteration, oldest first."""
    return _numbered_files(_exports(work_dir, student), _EXPORT)


def find_latest_checkpoint(work_dir: str | Path) -> Path | None:
    """Newest checkpoint of the run; a file gets its final name only when it is complete.

    While the files of an abandoned branch are being set aside, which a kill may have interrupted,
    those that are left of it do not count.
    """
    found = list_checkpoints(work_dir)
    branch = read_branch(work_dir)
    if branch is not None and not branch.is_settled:
        is_inside = branch.origin is not None and not Path(branch.origin).is_absolute()
        last = branch.iteration if is_inside else -1
        found = {number: path for number, path in found.items() if number <= last}
    return next(reversed(found.values()), None)


def record_latest(work_dir: str | Path) -> None:
    """Write ``last_checkpoint``, by which MMEngine's own tools find the newest checkpoint."""
    newest = find_latest_checkpoint(work_dir)
    path = Path(work_dir) / "last_checkpoint"
    if newest is None:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as partial:
        partial.write_text(str(newest))


def latest_files(folder: Path) -> list[Path]:
    """What stands for the newest export in a folder of exports."""
    names = (_LATEST, f"{_LATEST}.safetensors", f"{_LATEST}.json")
    return [folder / name for name in names if os.path.lexists(folder / name)]


def point_latest_to(path: Path) -> None:
    """Make ``teacher_latest`` the export at ``path``, and nothing else."""
    latest = path.with_name(_LATEST)
    _replace_by_copy(path.with_suffix(".json"), latest.with_suffix(".json"))
    if path.is_dir():
        link = latest.with_name(f".{latest.name}{PARTIAL_SUFFIX}")
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, latest)
        latest.with_suffix(".safetensors").unlink(missing_ok=True)
    else:
        _replace_by_copy(path, latest.with_suffix(".safetensors"))
        latest.unlink(missing_ok=True)


def remove_partial_files(work_dir: str | Path) -> list[Path]:
    """Delete what killed processes left half-written, and return the paths."""
    partial = list(_partial_files(Path(work_dir)))
    for path in partial:
        remove(path)
    return partial


def remove(path: Path) -> None:
    """Delete a file, or a folder with all it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _replace_by_copy(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``: a second name, or a copy where links fail."""
    with atomic_write(target) as partial:
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


def _exports(work_dir: str | Path, student: str | None) -> Path:
    return Path(work_dir) / "exports" / (student or "")


def _partial_files(work_dir: Path) -> Iterator[Path]:
    for folder in ("checkpoints", "exports", "exports/*"):
        yield from (work_dir / folder).glob(f".*{PARTIAL_SUFFIX}")


def _numbered_files(folder: Path, pattern: re.Pattern) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    found = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def surplus(
    files: Mapping[int, Path], max_to_keep: int | None, keep_every: int | None = None
) -> list[Path]:
    """Files that are neither among the newest nor kept for good.

    Args:
        files (Mapping[int, Path]): Files by iteration.
        max_to_keep (int | None): Newest files to keep; None keeps all.
        keep_every (int | None): Iterations divisible by it are kept for good and do not count.

    Returns:
        list[Path]: What to delete, oldest first.
    """
    if max_to_keep is None:
        return []
    passing = [n for n in sorted(files) if keep_every is None or n % keep_every]
    return [files[n] for n in passing[:-max_to_keep]]


# --- Going back begins a new branch ---
#
# ::
#
#     work_dir/branch.json                             where the newest branch left the old line
#     work_dir/abandoned/001_after_iter_00000020/      what lay beyond, in folders as before:
#         checkpoints/ exports/ captures/ evaluations.jsonl TIME/vis_data/scalars.json
#
# A branch begins where a checkpoint is resumed (``--resume PATH``) that is not the newest of the
# work folder or lies elsewhere, and where a run starts anew in a folder that has checkpoints.
# Nothing is deleted. The record is written before the first file moves, and again after the last:
# whenever the process dies, ``--resume`` goes on from the branch point.


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
