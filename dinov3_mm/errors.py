"""Which keyword arguments a class or function takes, found without building anything."""

import inspect
from collections.abc import Callable

from torch import nn

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
