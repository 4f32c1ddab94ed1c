"""Activation checkpointing that keeps what is expensive to compute again."""

from functools import partial

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

MODES = (False, True, "selective")

_ATEN = torch.ops.aten
# Matrix products and attention: nearly all of the arithmetic, a third of the activations.
_KEPT = frozenset(
    getattr(_ATEN, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "_scaled_mm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)


def run_recomputed(mode: bool | str, function, *inputs):
    """Run ``function(*inputs)`` and recompute its activations in the backward pass.

    Args:
        mode: True keeps the inputs only; 'selective' also keeps the results of matrix products and
            attention, and recomputes norms, activations and elementwise operations.
        function: must draw no random numbers.
        inputs: its arguments.
    """
    context = {}
    if mode == "selective":
        context = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **context)


def check_mode(mode: bool | str) -> bool | str:
    """Return ``mode`` if it is one of :data:`MODES`, else raise a ``ValueError``."""
    if mode not in MODES:
        raise ValueError(f"with_cp is {mode!r}; expected one of {MODES}")
    return mode


def _policy(_context, operator, *_args, **_kwargs) -> CheckpointPolicy:
    if operator in _KEPT:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
