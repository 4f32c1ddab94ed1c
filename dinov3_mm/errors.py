"""What errors are made of: the nearest known name, arguments of a class, the error of a config."""

import difflib
import inspect
from collections.abc import Callable, Iterable

from torch import nn


class ConfigError(ValueError):
    """A config that cannot be what its author meant; the message lists every finding."""


# --- The nearest known name ---


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


# --- Keyword arguments of a class or function, found without building anything ---


# Constructors that swallow any keyword and hand it to nobody.
_CHAIN_ENDS = (object, nn.Module)


def accepted_keywords(target: Callable) -> frozenset[str] | None:
    """Names that ``target`` can be called with.

    A constructor with ``**kwargs`` hands them on to its parent, so the parents' names count too, in
    the order of the MRO, until a constructor has no ``**kwargs``.

    Args:
        target (Callable): A class or a function.

    Returns:
        frozenset[str] | None: The names; None when the signature cannot tell: a function with
        ``**kwargs``, a class whose ``**kwargs`` end nowhere, or a built-in without signature.
    """
    if not inspect.isclass(target):
        names, is_open = _parameters(target)
        return None if is_open else names
    names: frozenset[str] = frozenset()
    is_open = False
    for cls in target.__mro__:
        if cls in _CHAIN_ENDS:
            break
        if "__init__" not in vars(cls):
            continue
        own, is_open = _parameters(cls.__init__)
        names |= own - {"self"}
        if not is_open:
            return names
    return None if is_open else frozenset()


def _parameters(function: Callable) -> tuple[frozenset[str], bool]:
    """Named parameters of ``function`` and whether it takes further keywords."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return frozenset(), True
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = frozenset(parameter.name for parameter in parameters if parameter.kind in named)
    return names, any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
