"""Files and folders that are either absent (or the old one) or complete, whatever happens."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL_SUFFIX = ".partial"


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file aside and rename it when it is complete.

    The body writes to the yielded path, a hidden sibling of ``path`` (``.<name>.<random>.partial``:
    the same file system, so the rename is atomic). When the body ends normally the file is flushed
    to disk and takes the place of ``path``; when it raises, the sibling is removed and ``path``
    stays as it was. A killed process leaves ``path`` as it was and a ``.partial`` file beside it.

    Args:
        path: Target file. Missing parent folders are made.

    Yields:
        The path to write to; nothing exists there yet.

    Raises:
        FileNotFoundError: If the body wrote nothing to the yielded path.
        IsADirectoryError: If ``path`` is a folder.

    Example:
        >>> with atomic_write("work_dir/iter_1.pth") as partial:
        ...     torch.save(state, partial)
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write a file at {path}: a folder of that name exists")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    try:
        yield partial
        flush_to_disk(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    # The rename itself lives in the folder: without this a power cut can bring the old file back.
    flush_to_disk(path.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Fill a folder aside and rename it when it is complete; see :func:`atomic_write`.

    Args:
        path: Target folder, which must not exist yet. Missing parent folders are made.

    Yields:
        An empty folder to fill, a hidden sibling of ``path``.

    Raises:
        FileExistsError: If something is at ``path``.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; remove it or choose another name")
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    partial.mkdir(parents=True)
    try:
        yield partial
        for entry in (*partial.rglob("*"), partial):
            flush_to_disk(entry)
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial)
        raise
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Make the content of a file, or the entries of a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
