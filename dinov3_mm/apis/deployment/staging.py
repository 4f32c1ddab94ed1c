"""Files that belong together and appear together, or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinov3_mm.checkpoints import atomic_write
from dinov3_mm.checkpoints.io import PARTIAL_SUFFIX

# Appended to the name of a file.
WEIGHTS_SUFFIX = ".data"
DESCRIPTION_SUFFIX = ".json"


def check_target(path: str | os.PathLike, suffix: str) -> Path:
    """The path of a file to write.

    Raises:
        ValueError: if its name does not end in ``suffix``.
        IsADirectoryError: if there is a folder of that name.
    """
    path = Path(path).expanduser()
    if path.suffix != suffix:
        raise ValueError(f"the file is called {path.name}; its name must end in {suffix}")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write a file at {path}: a folder of that name exists")
    return path


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Write ``path`` and what belongs to it aside, and put them in place when the body ends.

    The body writes to the yielded path, which has the final name in a hidden folder beside
    ``path``: a file may name its neighbours. It may also write weights (``<name>.data``) and a
    description (``<name>.json``). When the body raises, nothing is kept, and
    what was there before stays.

    A file with weights beside it is gone while the two are exchanged, so that it is never seen with
    the weights of another; a process killed then leaves the weights alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    folder.mkdir()
    try:
        partial = folder / path.name
        yield partial
        weights, description = _neighbours(partial)
        old_weights, old_description = _neighbours(path)
        if weights.exists() or old_weights.exists():
            path.unlink(missing_ok=True)
            old_weights.unlink(missing_ok=True)
        _move(weights, old_weights)
        _move(description, old_description)
        _move(partial, path)
    finally:
        shutil.rmtree(folder)


def _neighbours(path: Path) -> tuple[Path, Path]:
    return (
        path.with_name(path.name + WEIGHTS_SUFFIX),
        path.with_name(path.name + DESCRIPTION_SUFFIX),
    )


def _move(source: Path, target: Path) -> None:
    if source.exists():
        with atomic_write(target) as aside:
            os.replace(source, aside)
