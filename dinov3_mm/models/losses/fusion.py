"""Pieces of the losses that torch.compile turns into few passes over their matrices.

The matrices of samples and prototypes are the largest tensors of a step, and each of torch's
operators reads and writes all of one. Compiled, neighbouring operators share a pass. Collectives
stay between the pieces. A piece is an ordinary function until :func:`compile_losses` is called.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

_is_on = False


def compile_losses(is_on: bool = True) -> None:
    """Compile the pieces from now on, each when it first runs; False goes back."""
    global _is_on
    _is_on = is_on


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a piece: a function of tensors and numbers that may write to its tensors."""

    @cache
    def compiled() -> Callable[..., Any]:
        # The numbers of rows change from step to step.
        return torch.compile(function, dynamic=True)

    @wraps(function)
    def run(*arguments):
        # A matrix without rows has nothing to fuse, and would be compiled for itself.
        is_empty = any(isinstance(each, Tensor) and not each.numel() for each in arguments)
        if not _is_on or is_empty or torch.compiler.is_compiling():
            return function(*arguments)
        # A number would be compiled into the piece, and temperatures follow schedules.
        device = arguments[0].device
        return compiled()(
            *(
                torch.full((), each, device=device) if isinstance(each, float) else each
                for each in arguments
            )
        )

    return run
