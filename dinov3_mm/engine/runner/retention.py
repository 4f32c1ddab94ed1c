"""Which of a run's numbered files may go."""

from collections.abc import Mapping
from pathlib import Path


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
