"""Where a pretraining run keeps its files.

::

    work_dir/checkpoints/iter_00001000.pth          everything a resume needs, or
    work_dir/checkpoints/iter_00001000/             the same in shards
    work_dir/exports/iter_00001000_teacher.safetensors + .json    the teacher backbone, for users
    work_dir/exports/teacher_latest.safetensors + .json           the newest of them
    work_dir/exports/NAME/...                       the same of each student of several

An export that is too large for one file is a folder of the same name without suffix, and
``teacher_latest`` a link to it.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from dinov3_mm.checkpoints.io import PARTIAL_SUFFIX

_CHECKPOINT = re.compile(r"iter_(\d{8,})(?:\.pth)?")
_EXPORT = re.compile(r"iter_(\d{8,})_teacher(?:\.safetensors)?")


def checkpoint_path(work_dir: str | Path, iteration: int, *, sharded: bool = False) -> Path:
    """Checkpoint after ``iteration`` optimizer steps: a file, or a folder of shards."""
    suffix = "" if sharded else ".pth"
    return Path(work_dir) / "checkpoints" / f"iter_{iteration:08d}{suffix}"


def export_path(work_dir: str | Path, iteration: int, student: str | None = None) -> Path:
    """Teacher export after ``iteration`` optimizer steps, of one student if there are several."""
    return _exports(work_dir, student) / f"iter_{iteration:08d}_teacher.safetensors"


def latest_export_path(work_dir: str | Path, student: str | None = None) -> Path:
    """Copy of the newest teacher export, or the link to it where exports are folders."""
    path = _exports(work_dir, student) / "teacher_latest.safetensors"
    return path.with_suffix("") if path.with_suffix("").is_dir() else path


def list_checkpoints(work_dir: str | Path) -> dict[int, Path]:
    """Complete checkpoints by iteration, oldest first."""
    return _numbered_files(Path(work_dir) / "checkpoints", _CHECKPOINT)


def list_exports(work_dir: str | Path, student: str | None = None) -> dict[int, Path]:
    """Teacher exports by iteration, oldest first."""
    return _numbered_files(_exports(work_dir, student), _EXPORT)


def find_latest_checkpoint(work_dir: str | Path) -> Path | None:
    """Newest checkpoint; a file gets its final name only when it is complete."""
    return next(reversed(list_checkpoints(work_dir).values()), None)


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
