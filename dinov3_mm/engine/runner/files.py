"""Where a pretraining run keeps its files.

::

    work_dir/checkpoints/iter_00001000.pth          everything a resume needs, or
    work_dir/checkpoints/iter_00001000/             the same in shards
    work_dir/exports/iter_00001000_teacher.safetensors + .json    the teacher backbone, for users
    work_dir/exports/teacher_latest.safetensors + .json           the newest of them
    work_dir/exports/NAME/...                       the same of each student of several
    work_dir/last_checkpoint                        path of the newest checkpoint, for MMEngine
    work_dir/branch.json, abandoned/...             where the run went back, and what it left:
                                                    see :mod:`dinov3_mm.engine.runner.branches`

An export that is too large for one file is a folder of the same name without suffix, and
``teacher_latest`` a link to it.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dinov3_mm.checkpoints.io import PARTIAL_SUFFIX, atomic_write

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
