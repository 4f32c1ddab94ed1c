"""Whether the files that features were made from are still those files."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

# Asking a network disk about a file takes a millisecond of waiting.
_THREADS = 16
_BLOCK = 2**20


class FileState(NamedTuple):
    """What is known of a file without reading an image.

    Attributes:
        size: bytes.
        modified: time of the last modification, in ns.
        content: SHA-256 of the bytes, where it was asked for.
    """

    size: int
    modified: int
    content: str | None = None


def file_states(paths: Sequence[str], *, content: bool = False) -> list[FileState | None]:
    """The states of files, of links those of what they point to; None where there is no file.

    Args:
        paths: the files.
        content: hash the bytes too. A copy or a synchronisation that restores the time of a file of
            the same size is noticed by nothing else.
    """

    def state(path: str) -> FileState | None:
        try:
            found = os.stat(path)
            digest = _content(path) if content else None
        except (OSError, ValueError):
            return None
        return FileState(found.st_size, found.st_mtime_ns, digest)

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(state, paths, chunksize=256))


def is_same(there: Sequence | None, now: FileState | None) -> bool:
    """Whether a file is the one whose state was written down.

    Where both hashes are known they decide; where one is asked for and was not written down, the
    file may be another.
    """
    if there is None or now is None:
        return there is now
    size, modified, content = there
    if now.content is not None:
        return content == now.content
    return (size, modified) == (now.size, now.modified)


def some(names: Iterable[str], shown: int = 3) -> str:
    """A few names for a message, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _content(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
