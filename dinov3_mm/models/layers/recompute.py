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
        "_flash_attention_forward",
        "_efficient_attention_forward",
    )
)
# Operators of torch's variable-length attention and of xformers, which register when imported.
_KEPT_NAMES = (
    "torch_attn::_varlen_attn",
    "xformers_flash::flash_fwd",
    "xformers_flash3::flash_fwd",
)


def run_recomputed(mode: bool | str, function, *inputs):
    """Run ``function(*inputs)`` and recompute its activations in the backward pass.

    To be called within what is compiled: the compiler then knows what is to be kept, and plans the
    backward pass accordingly. Around compiled code it would see that code's own operators.

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
    if operator in _KEPT or operator.name() in _KEPT_NAMES:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
