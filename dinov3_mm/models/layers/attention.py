"""Self-attention over packed sequences, and the linear layer of all networks."""

import importlib.util
import json
import os
import warnings
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .rope import QueryKeyValue, RopeTables, SequenceShape, rotate_packed_qkv, split_packed_qkv

# --- A linear layer that takes the faster of torch's two CPU libraries ---


# On the CPU ``F.linear`` multiplies fp32 matrices with MKL, which leaves AVX-512 unused on
# processors of other makers, and bf16 ones with oneDNN after a pass over the output for the bias.
# This operator, which torch.compile calls, is oneDNN for both, with the bias inside: half the time
# in fp32 on an AMD EPYC (Zen 5). It has no gradient.
_ONEDNN_LINEAR = None
_ONEDNN_DTYPES: tuple[torch.dtype, ...] = ()
if torch.backends.mkldnn.is_available():
    _ONEDNN_LINEAR = torch.ops.mkldnn._linear_pointwise.default
    _ONEDNN_DTYPES = (torch.float32,)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        _ONEDNN_DTYPES += (torch.bfloat16,)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, with oneDNN for inference on the CPU."""
    if _suits_onednn(x, weight):
        return _ONEDNN_LINEAR(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in _ONEDNN_DTYPES
        and type(weight) is nn.Parameter  # subclasses have products of their own
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch.backends.mkldnn.enabled
    )


class Linear(nn.Linear):
    """``nn.Linear``, with oneDNN for inference on the CPU.

    Attributes:
        product: ``product(x, weight, bias)``; another kind of matrix product may take its place.
    """

    product = staticmethod(linear)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., C) to (..., D)."""
        return self.product(x, self.weight, self.bias)


# --- Attention that keeps its probabilities, for short 16-bit sequences in training on a CPU ---
#
# Torch's 16-bit attention on the CPU is slow in its backward pass: three times slower than matrix
# products at 200 tokens, ten times at 40, because it does not use the processor's 16-bit products.


# The probabilities of longer sequences would take more memory than the rest of a block.
MAX_TOKENS = 256


def prefers_dense_attention(query: Tensor) -> bool:
    """Whether :func:`dense_attention` is the faster one for ``query`` (B, heads, T, head_dims)."""
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.requires_grad
        and torch.is_grad_enabled()
        and query.shape[2] <= MAX_TOKENS
        and not torch.compiler.is_compiling()
    )


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(head_dims)) v`` with fp32 scores and 16-bit probabilities.

    Args:
        query, key, value: (B, heads, T, head_dims), 16-bit.

    Returns:
        (B, heads, T, head_dims) in the dtype of ``value``. The rounding error, forward and backward
        is of the size of that of torch's fused attention.
    """
    return _DenseAttention.apply(query, key, value)


class _DenseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = query.shape[-1] ** -0.5
        # Autocast would round the scores to 16 bits.
        with torch.autocast(query.device.type, enabled=False):
            scores = (query.float() * scale) @ key.float().transpose(-1, -2)
            probs = scores.softmax(-1).to(value.dtype)
        ctx.save_for_backward(query, key, value, probs)
        return probs @ value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, probs = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        grad_probs = grad @ value.transpose(-1, -2)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
        return (
            (grad_scores @ key).mul_(scale),
            (grad_scores.transpose(-1, -2) @ query).mul_(scale),
            probs.transpose(-1, -2) @ grad,
        )


# --- Self-attention ---


ATTN_BACKENDS = ("auto", "sdpa", "xformers", "varlen")
# Where ``benchmarks/attention_backends.py --record`` keeps which backend is the fastest on a GPU.
RECORD_VARIABLE = "DINOV3_MM_ATTENTION"
DEFAULT_RECORD = Path("~/.cache/dinov3_mm/attention.json")


class Packing(NamedTuple):
    """How the images of a packed batch attend, the same for all blocks of a forward pass.

    Made outside of the blocks, so that a compiled block holds no copy from the host.

    Attributes:
        backend: 'sdpa', 'xformers' or 'varlen'.
        starts: (images + 1,) int32, the first token of every image and the end; None for 'sdpa'.
        longest: most tokens of an image.
        mask: block-diagonal mask of 'xformers', else None.
    """

    backend: str
    starts: Tensor | None = None
    longest: int = 0
    mask: Any = None


class MaskedKBiasLinear(Linear):
    """The fused q, k, v projection with a bias that is switched off for k.

    The effective bias is ``bias * bias_mask``; the mask (1 for q and v, 0 for k) is a buffer, so
    that a checkpoint decides: the released files hold zeros throughout.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=True)
        self.register_buffer("bias_mask", torch.ones(out_features))
        self.reset_bias_mask()

    @torch.no_grad()
    def reset_bias_mask(self) -> None:
        """Write 1, 0, 1 to the thirds of the mask: q and v keep their bias, k loses it."""
        third = self.out_features // 3
        self.bias_mask.fill_(1)
        self.bias_mask[third : 2 * third].fill_(0)

    def forward(self, x: Tensor) -> Tensor:
        """Project ``x`` (..., D) to (..., 3 D)."""
        return self.product(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class SelfAttention(nn.Module):
    """Multi-head self-attention within each image of a packed batch.

    Args:
        dims, num_heads: width and heads.
        qkv_bias, proj_bias: biases of the two projections.
        mask_k_bias: see :class:`MaskedKBiasLinear`; without ``qkv_bias`` there is nothing to mask.
        backend: 'sdpa' calls torch's attention once per entry; 'xformers' and 'varlen' (torch's
            variable-length attention) make one call for all entries, on a GPU; 'auto' decides for
            several entries on CUDA, see :func:`fastest_backend`.

    Raises:
        ImportError: if the backend is 'xformers' and it is not installed.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        mask_k_bias: bool = False,
        proj_bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if backend not in ATTN_BACKENDS:
            raise ValueError(f"attn_backend is {backend!r}; expected one of {ATTN_BACKENDS}")
        self.num_heads = num_heads
        self.backend = backend
        if backend == "xformers" and not _has_xformers():
            raise ImportError(
                "attn_backend is 'xformers', which is not installed; install the extra "
                "'dinov3_mm[gpu]' or use attn_backend='auto'"
            )
        if mask_k_bias and qkv_bias:
            self.qkv = MaskedKBiasLinear(dims, 3 * dims)
        else:
            self.qkv = Linear(dims, 3 * dims, bias=qkv_bias)
        self.proj = Linear(dims, dims, bias=proj_bias)

    def forward(
        self,
        x: Tensor,
        shapes: list[SequenceShape],
        tables: list[RopeTables] | None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Attend within each image.

        Args:
            x: packed tokens (sum of images * tokens, D).
            shapes: (images, tokens) of each packed entry.
            tables: RoPE sine and cosine of each entry; None for no rotation.
            packing: of these shapes, see :meth:`pack`; None makes one.
        """
        packing = self.pack(x, shapes) if packing is None else packing
        qkv = self.qkv(x)
        if tables is None:
            entries = split_packed_qkv(qkv, self.num_heads, shapes)
        else:
            entries = rotate_packed_qkv(qkv, self.num_heads, shapes, tables)
        if packing.backend == "sdpa":
            return self.proj(attend_per_entry(entries))
        return self.proj(attend_packed(entries, packing))

    def pack(self, x: Tensor, shapes: list[SequenceShape]) -> Packing:
        """Choose the backend for ``x`` (tokens, D), and make what its calls have in common.

        A variable-length kernel that was asked for and does not run here gives way to 'sdpa', with
        a warning that says why.
        """
        backend = self.backend
        if backend == "auto":
            several = x.is_cuda and len(shapes) > 1
            backend = fastest_backend(x.device.index or 0) if several else "sdpa"
        if backend == "varlen":
            reason = varlen_obstacle(x, x.shape[-1] // self.num_heads)
            if reason is not None:
                if self.backend == "varlen":
                    _warn_once(f"attn_backend='varlen' {reason}: attention takes 'sdpa' here")
                backend = "sdpa"
        if backend == "sdpa":
            return Packing(backend)
        longest = max(tokens for _, tokens in shapes)
        mask = _block_diagonal_mask(shapes, x.device) if backend == "xformers" else None
        starts = sequence_starts(shapes, x.device) if backend == "varlen" else None
        return Packing(backend, starts, longest, mask)


def attend_per_entry(entries: list[QueryKeyValue]) -> Tensor:
    """Attention for each entry in turn; returns packed tokens (sum of images * tokens, D)."""
    outputs = []
    for query, key, value in entries:
        dense = prefers_dense_attention(query)
        attend = dense_attention if dense else F.scaled_dot_product_attention
        outputs.append(attend(query, key, value).transpose(1, 2).flatten(0, 1).flatten(1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend_packed(entries: list[QueryKeyValue], packing: Packing) -> Tensor:
    """One call for all entries; returns packed tokens (sum of images * tokens, D)."""
    query, key, value = (
        torch.cat([t.transpose(1, 2).flatten(0, 1) for t in parts]) for parts in zip(*entries)
    )  # (tokens of all images, heads, head_dims)
    if packing.backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        bounds = (packing.starts, packing.starts, packing.longest, packing.longest)
        return varlen_attn(query, key, value, *bounds).flatten(1)
    from xformers.ops import memory_efficient_attention

    packed = (t[None] for t in (query, key, value))
    return memory_efficient_attention(*packed, attn_bias=packing.mask)[0].flatten(1)


def sequence_starts(shapes: list[SequenceShape], device: torch.device) -> Tensor:
    """First token of every image of a packed batch, and the end: (images + 1,) int32.

    Counted on the device: nothing is copied to it.
    """
    parts, first = [], 0
    for images, tokens in shapes:
        end = first + images * tokens
        parts.append(torch.arange(first, end, tokens, dtype=torch.int32, device=device))
        first = end
    parts.append(torch.full((1,), first, dtype=torch.int32, device=device))
    return torch.cat(parts)


def varlen_obstacle(x: Tensor, head_dims: int) -> str | None:
    """Why torch's variable-length attention cannot run for ``x`` (tokens, D); None if it can."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"needs a newer torch than {torch.__version__} (2.10 has it)"
    if not x.is_cuda:
        return f"needs a CUDA device, and the tokens are on {x.device.type}"
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, and attention runs in {dtype}"
    if head_dims % 8 or head_dims > 256:
        return f"needs heads of 8, 16, ... or 256 channels, and these have {head_dims}"
    if _is_present(x.device.index or 0):  # fake tensors have no GPU
        major, minor = torch.cuda.get_device_capability(x.device)
        if major < 8:
            return f"needs compute capability 8.0, and {x.device} has {major}.{minor}"
    return None


@lru_cache(maxsize=16)
def fastest_backend(device_index: int) -> str:
    """What 'auto' takes for several entries on a GPU.

    The backend that ``benchmarks/attention_backends.py --record`` found the fastest on a GPU of
    this name with this torch. Where nothing was measured: xformers if it is installed, else 'sdpa'.
    """
    usual = "xformers" if _has_xformers() else "sdpa"
    if not _is_present(device_index):
        return usual
    found = read_record().get(torch.cuda.get_device_name(device_index), {})
    fastest = found.get("fastest")
    if found.get("torch") != str(torch.__version__) or fastest not in ATTN_BACKENDS[1:]:
        return usual
    return usual if fastest == "xformers" and not _has_xformers() else fastest


def _has_xformers() -> bool:
    return importlib.util.find_spec("xformers") is not None


def _is_present(device_index: int) -> bool:
    return torch.cuda.device_count() > device_index


def record_path() -> Path:
    """File of measured backends: that of the variable ``DINOV3_MM_ATTENTION``, or of the user."""
    return Path(os.environ.get(RECORD_VARIABLE) or DEFAULT_RECORD).expanduser()


def read_record() -> dict[str, dict[str, Any]]:
    """Measured backends by name of the GPU; empty where nothing was measured."""
    path = record_path()
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, OSError) as error:
        warnings.warn(f"{path} is not read: {error}; measure again to replace it", stacklevel=2)
        return {}


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _block_diagonal_mask(shapes: list[SequenceShape], device: torch.device) -> Any:
    """The mask of 'xformers', whose making copies to the device."""
    from xformers.ops import fmha

    lengths = [tokens for images, tokens in shapes for _ in range(images)]
    return fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=device)
