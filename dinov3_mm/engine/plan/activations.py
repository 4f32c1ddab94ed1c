"""Tensors that one network keeps for its backward pass, or holds while it runs.

Sizes are in bytes. For a block of width D and hidden width H, on k tokens (those of the images that
take part in the branch), with c bytes per activation, are kept for the backward pass:

- norm 1: its input (k D), mean and reciprocal deviation (2 k, fp32); under bf16 autocast on a GPU
  the norm runs in fp32 and keeps an fp32 copy of the input;
- qkv: its input (k D); its output (3 k D), of which v is a view; rotated q and k (2 k D);
- attention: its output (k D), log sum exp (k heads, fp32), the outputs of all crops in one
  matrix (k D);
- projection: its output (k D), which the layer scale keeps; with stochastic depth also the scaled
  output (k D), which is added to the images that take part; so after the feed-forward;
- norm 2 as norm 1; feed-forward: its input (k D), output (k D), and two hidden matrices (k H), four
  where it is gated.

With ``with_cp='selective'`` the outputs of matrix products and of the attention stay, and the
block's input; with ``with_cp=True`` the input alone. The same holds for compiled blocks, which
contain their checkpoint.
"""

from collections.abc import Iterable

from .workload import Head, Sequence, Transformer

FP32 = 4


def tokens_of(sequences: Iterable[Sequence]) -> int:
    """Tokens of all images."""
    return sum(images * tokens for images, tokens in sequences)


def block_saved(
    vit: Transformer, sequences: tuple[Sequence, ...], width: int, *, on_gpu: bool
) -> int:
    """What a block keeps for its backward pass without recomputation.

    Args:
        vit: sizes.
        sequences: what the student sees.
        width: bytes of an activation.
        on_gpu: fused attention for all lengths, norms in fp32.
    """
    kept = vit.kept(sequences)
    tokens = tokens_of(kept)
    dims = tokens * vit.dims
    norm_input = FP32 if on_gpu else width
    norms = 2 * (dims * (norm_input + width) + 2 * tokens * FP32)
    joined = len(sequences) > 1
    attention = dims * (3 + 2 + 1 + joined + 1) * width
    statistics = _attention_statistics(vit, kept, width, on_gpu=on_gpu)
    hidden = 4 if vit.is_gated else 2
    feed_forward = (hidden * tokens * vit.hidden + dims) * width
    scaled = 2 * dims * width if vit.drop_path_rate else 0
    return norms + attention + statistics + feed_forward + scaled


def block_input(vit: Transformer, sequences: tuple[Sequence, ...], width: int) -> int:
    """The residual stream between two blocks."""
    return tokens_of(sequences) * vit.dims * width


def block_products(
    vit: Transformer, sequences: tuple[Sequence, ...], width: int, *, on_gpu: bool
) -> int:
    """Outputs of a block's matrix products and of its attention."""
    kept = vit.kept(sequences)
    tokens = tokens_of(kept)
    hidden = 2 if vit.is_gated else 1
    products = tokens * (vit.dims * (3 + 1 + 1 + 1) + hidden * vit.hidden) * width
    statistics = 0
    for images, length in kept:
        if _is_dense(length, width, on_gpu=on_gpu):
            statistics += images * vit.num_heads * length**2 * FP32  # scores
        else:
            statistics += images * vit.num_heads * length * FP32
    return products + statistics


def block_recomputed(
    vit: Transformer,
    sequences: tuple[Sequence, ...],
    width: int,
    recompute: bool | str,
    *,
    on_gpu: bool,
) -> int:
    """What the backward pass of a block brings back beside what was kept."""
    if not recompute:
        return 0
    again = block_saved(vit, sequences, width, on_gpu=on_gpu)
    if recompute == "selective":
        again -= block_products(vit, sequences, width, on_gpu=on_gpu)
    shares_input = not vit.drop_path_rate and (width == FP32 or not on_gpu)
    return again - (block_input(vit, sequences, width) if shares_input else 0)


def block_working(
    vit: Transformer, sequences: tuple[Sequence, ...], width: int, *, grad: bool
) -> int:
    """Most that a block holds beside what it keeps: gradients, or the forward pass without grad.

    Backward, the gated or activated hidden layer has the gradients of its output and input at a
    time, and the residual stream has the gradient of the block and of the branch.
    """
    kept = vit.kept(sequences) if grad else sequences
    tokens, stream = tokens_of(kept), tokens_of(sequences) * vit.dims
    dims = tokens * vit.dims
    if grad:
        hidden = (2 if vit.is_gated else 1) * tokens * vit.hidden
        return (hidden + 2 * stream) * width
    hidden = (3 if vit.is_gated else 2) * tokens * vit.hidden
    return max(hidden + 2 * dims, 7 * dims) * width


def embedding_kept(vit: Transformer, sequences: tuple[Sequence, ...], width: int) -> int:
    """Pixels as the rows of a matrix, and the first block's input."""
    patches = sum(images * (tokens - vit.num_prefix) for images, tokens in sequences)
    pixels = patches * vit.channels * vit.stride**2
    return pixels * width + tokens_of(sequences) * vit.dims * width


def final_norm_kept(
    vit: Transformer, sequences: tuple[Sequence, ...], width: int, *, on_gpu: bool
) -> int:
    """Input and output of the final norm."""
    norm_input = FP32 if on_gpu else width
    return tokens_of(sequences) * (vit.dims * (norm_input + width) + 2 * FP32)


def head_kept(head: Head, rows: int, width: int) -> int:
    """What a head keeps up to the bottleneck: its input, two matrices for each hidden layer, and
    the bottleneck before and after its normalisation.
    """
    hidden = sum(head.widths[1:-1])
    # Autocast divides by an fp32 norm, and the next product takes a 16-bit copy.
    normalised = 2 if width == FP32 else 4
    return rows * (head.widths[0] + 2 * hidden + normalised * head.bottleneck) * width


def _attention_statistics(
    vit: Transformer, sequences: Iterable[Sequence], width: int, *, on_gpu: bool
) -> int:
    """Log sum exp of fused attention, or the probabilities of dense attention."""
    total = 0
    for images, length in sequences:
        if _is_dense(length, width, on_gpu=on_gpu):
            total += images * vit.num_heads * length**2 * width
        else:
            total += images * vit.num_heads * length * FP32
    return total


def _is_dense(length: int, width: int, *, on_gpu: bool) -> bool:
    # Dense attention is for short 16-bit sequences on a CPU.
    return not on_gpu and width == 2 and length <= 256
