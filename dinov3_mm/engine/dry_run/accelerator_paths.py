"""The code paths of an accelerator, on tensors that claim to be on the CPU.

Fake tensors of a CUDA device cannot go through a backward pass on a machine without one. A dry run
therefore uses fake CPU tensors, and in this context everything that the package does differently on
the CPU is done as on a GPU, unless the paths of the CPU are asked for.
"""

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

_LOSS = importlib.import_module("dinov3_mm.models.losses.soft_cross_entropy")

# Module, attribute and value: choices that read the device type.
_REPLACED: tuple[tuple[str, str, Any], ...] = (
    # Fused attention whatever the length and dtype.
    ("dinov3_mm.models.layers.attention", "prefers_dense_attention", lambda query: False),
    ("dinov3_mm.models.layers.linear", "_suits_onednn", lambda x, weight: False),
    ("dinov3_mm.models.layers.fp8", "_scaled_product", lambda a, sa, b, sb: _fp8_product(a, b)),
    ("dinov3_mm.models.losses.soft_cross_entropy", "CPU_CHUNK", _LOSS.DEVICE_CHUNK),
)
# Clipping without a look at the norm, which has no value.
_NO_LOOK = ("dinov3_mm.engine.optim.wrapper", "_is_known_to_fit", lambda norm, limit: False)
# Class and method: inference on few images at a time.
_WHOLE_BATCHES = (
    ("dinov3_mm.models.backbones.vit_trunk", "ViTTrunk", "_max_chunk_rows"),
    ("dinov3_mm.models.layers.convnext_block", "ConvNeXtBlock", "_max_chunk_rows"),
)


@contextmanager
def accelerator_paths(on_gpu: bool = True) -> Iterator[None]:
    """Context in which CPU tensors take the way of tensors on a GPU with NCCL.

    Args:
        on_gpu: False leaves them the way of the CPU, except that nothing looks at values.
    """
    with ExitStack() as stack:
        for module, name, value in (_NO_LOOK, *(_REPLACED if on_gpu else ())):
            stack.enter_context(_replaced(importlib.import_module(module), name, value))
        if not on_gpu:
            yield
            return
        for module, owner, name in _WHOLE_BATCHES:
            target = getattr(importlib.import_module(module), owner)
            stack.enter_context(_replaced(target, name, lambda self, x: None))
        stack.enter_context(_replaced(F, "layer_norm", _autocast_layer_norm))
        if dist.is_initialized():
            # Decides how the gradient of a gathered tensor is reduced.
            backend = dist.Backend.NCCL
            stack.enter_context(_replaced(dist, "get_backend", lambda group=None: backend))
        yield


@contextmanager
def _replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


_layer_norm = F.layer_norm


def _autocast_layer_norm(x: Tensor, shape, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    """CUDA autocast runs layer norms in float32 and keeps that input for the backward pass."""
    if torch.is_autocast_enabled("cpu"):
        x, weight, bias = (None if t is None else t.float() for t in (x, weight, bias))
    return _layer_norm(x, shape, weight, bias, eps)


def _fp8_product(a: Tensor, b: Tensor) -> Tensor:
    """Shapes and dtypes of the scaled float8 product (n, m) of rows."""
    fp8 = torch.float8_e4m3fn
    return a.to(fp8).to(torch.bfloat16) @ b.to(fp8).to(torch.bfloat16).t()
