"""Nearest known name, for error messages."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Known name that ``name`` was most likely meant to be; None when nothing is near.

    The comparison ignores case and underscores: ``drop_path`` and ``DropPath`` are one word.
    """
    folded = {_fold(candidate): candidate for candidate in known}
    match = difflib.get_close_matches(_fold(name), folded, n=1, cutoff=cutoff)
    return folded[match[0]] if match else None


def hint(name: str, known: Iterable[str]) -> str:
    """End of an error message: the nearest name, or the list of names when none is near."""
    known = sorted(known)
    match = nearest(name, known)
    if match is not None:
        return f"did you mean {match!r}?"
    return f"known: {', '.join(known) or 'nothing'}"


def _fold(name: str) -> str:
    return name.replace("_", "").lower()
