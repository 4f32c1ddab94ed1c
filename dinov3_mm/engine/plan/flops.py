"""Floating-point operations of a step, from shapes: a product of (n, a) and (a, b) counts 2 n a b.

Counted are linear layers, attention, prototypes and Gram matrices; norms, activations and the
optimizer are left out. The backward pass of a product is two products. Fused attention computes its
scores again: its backward pass is five products where the forward pass has two.
"""

from .options import Option
from .workload import Head, Sequence, Transformer, Workload


def step_flops(work: Workload, option: Option) -> dict[str, int]:
    """Operations of one rank in a step, by part."""
    vit = work.backbone
    seen = work.student_sequences
    blocks, attention = block_flops(vit, vit.kept(seen))
    embedding = embedding_flops(vit, seen)
    teacher, *teacher_heads = work.teacher or (vit, work.dino_head, work.ibot_head)
    rows = (work.num_global + work.num_local, work.crops.num_masked)
    heads = (work.dino_head, work.ibot_head)
    projections = sum(_mlp(head, n) for head, n in zip(heads, rows))
    parts = {
        "student, forward": blocks + attention + embedding + projections,
        "student, backward": 2 * (blocks + projections) + attention * 5 // 2 + embedding,
        "student, recomputed": blocks + attention if option.recompute is True else 0,
        "teacher": _forward(teacher, work.teacher_sequences)
        + sum(_mlp(h, n) for h, n in zip(teacher_heads, (work.num_global, rows[1]))),
        "Gram teacher": _forward(vit, work.gram_sequences),
        "prototypes": _prototypes(work, option.chunk_size),
        "Gram matrices": _gram(work),
    }
    return {name: work.accumulate * count for name, count in parts.items()}


def block_flops(vit: Transformer, sequences: tuple[Sequence, ...]) -> tuple[int, int]:
    """Operations of all blocks in the forward pass: linear layers, attention."""
    tokens = sum(images * length for images, length in sequences)
    pairs = sum(images * length**2 for images, length in sequences)
    matrices = 4 * vit.dims**2 + (3 if vit.is_gated else 2) * vit.dims * vit.hidden
    return vit.num_layers * 2 * tokens * matrices, vit.num_layers * 4 * pairs * vit.dims


def embedding_flops(vit: Transformer, sequences: tuple[Sequence, ...]) -> int:
    """Operations of the patch embedding in the forward pass."""
    patches = sum(images * (length - vit.num_prefix) for images, length in sequences)
    return 2 * patches * vit.channels * vit.stride**2 * vit.dims


def _forward(vit: Transformer, sequences: tuple[Sequence, ...]) -> int:
    return sum(block_flops(vit, sequences)) + embedding_flops(vit, sequences)


def _mlp(head: Head, rows: int) -> int:
    return 2 * rows * sum(a * b for a, b in zip(head.widths, head.widths[1:]))


def _prototypes(work: Workload, chunk_size: int | None) -> int:
    """Products with the prototypes; in chunks those of the teacher and student are repeated."""
    total = 0
    cls, patches = (work.dino_head, work.ibot_head)
    # Head, rows of the student, rows of the teacher, losses that look at the teacher's.
    for head, student, teacher, losses in (
        (cls, work.num_global + work.num_local, work.num_global, 2),
        (patches, work.crops.num_masked, work.crops.num_masked, 1),
    ):
        product = 2 * head.bottleneck * head.num_prototypes
        if chunk_size is None:
            total += product * (3 * student + teacher)
        else:
            # Three rounds of Sinkhorn-Knopp; each loss once forward and once backward.
            total += product * (4 * student + (3 + 2 * losses) * teacher)
    return total


def _gram(work: Workload) -> int:
    if work.gram is None:
        return 0
    images, tokens = work.student_sequences[0]
    tokens -= work.backbone.num_prefix
    if not work.gram_by_image:
        images, tokens = 1, images * tokens
    return 4 * 2 * images * tokens**2 * work.backbone.dims  # two forward, two backward
