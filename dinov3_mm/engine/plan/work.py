"""Operations of a step, and what the ranks send each other in it, from shapes.

Counted are linear layers, convolutions, attention, prototypes and Gram matrices; the optimizer is
left out. The backward pass of a product is two products. Fused attention computes its scores again:
its backward pass is five products where the forward pass has two.
"""

from typing import NamedTuple

from dinov3_mm.engine.dry_run.collectives import sent_per_rank

from .memory import shards
from .options import Option
from .workload import Head, Workload

FP32 = 4
SINKHORN_ROUNDS = 3


def step_flops(work: Workload, option: Option) -> dict[str, int]:
    """Operations of one rank in a step, by part."""
    backbone = work.backbone
    student = backbone.flops(work.student_crops, grad=True)
    teacher, *teacher_heads = work.teacher or (backbone, work.dino_head, work.ibot_head)
    rows = (work.num_global + work.num_local, work.crops.num_masked)
    projections = sum(_mlp(head, n) for head, n in zip((work.dino_head, work.ibot_head), rows))
    blocks = student.linear + student.attention
    gram = 0
    if work.gram is not None:
        count, patches = work.gram_rows
        gram = 4 * 2 * count * patches**2 * backbone.dims  # two forward, two backward
    parts = {
        "student, forward": student.total + projections,
        "student, backward": 2 * (student.linear + projections)
        + student.attention * 5 // 2
        + student.embedding,
        "student, recomputed": blocks if option.recompute is True else 0,
        "teacher": teacher.flops(work.teacher_crops).total
        + sum(_mlp(head, n) for head, n in zip(teacher_heads, (work.num_global, rows[1]))),
        "Gram teacher": backbone.flops(work.gram_crops).total,
        "prototypes": _prototypes(work, option.chunk_size),
        "Gram matrices": gram,
    }
    return {name: work.accumulate * count for name, count in parts.items()}


def _mlp(head: Head, rows: int) -> int:
    return 2 * rows * sum(a * b for a, b in zip(head.widths, head.widths[1:]))


def _prototypes(work: Workload, chunk_size: int | None) -> int:
    """Products with the prototypes; in chunks those of the teacher and student are repeated."""
    total = 0
    patches = work.crops.num_masked
    # Head, rows of the student, rows of the teacher, losses that look at the teacher's.
    for head, student, teacher, losses in (
        (work.dino_head, work.num_global + work.num_local, work.num_global, 2),
        (work.ibot_head, patches, patches, 1),
    ):
        if chunk_size is None:
            rows = 3 * student + teacher
        else:
            # Three rounds of Sinkhorn-Knopp; each loss once forward and once backward.
            rows = 4 * student + (SINKHORN_ROUNDS + 2 * losses) * teacher
        total += 2 * head.bottleneck * head.num_prototypes * rows
    return total


class Traffic(NamedTuple):
    """One kind of collective of a step.

    Attributes:
        purpose: what it is for.
        operation: 'all-gather', 'reduce-scatter' or 'all-reduce'.
        calls: how often; None where the library decides.
        size: bytes of the whole tensors.
        sent: bytes that a rank sends in the ring algorithm.
    """

    purpose: str
    operation: str
    calls: int | None
    size: int
    sent: float


def step_traffic(work: Workload, option: Option, world_size: int) -> list[Traffic]:
    """Collectives of a step; none where there is one process without a process group."""
    if option.strategy == "single":
        return []
    times, student = work.accumulate, work.networks["student"]
    if option.is_sharded:
        rows = _sharded(work, option, shards(option, world_size))
    else:
        # Once per step, whatever the number of micro batches.
        rows = [("gradients", "all-reduce", None, FP32 * student.local(1, trained=True))]
    rows.append(("Sinkhorn-Knopp", "all-reduce", *_sinkhorn(work, option, world_size)))
    if work.koleo_over_ranks and world_size > 1:
        size = FP32 * work.num_global * work.backbone.dims * world_size * times
        rows += [("KoLeo", "all-gather", times, size), ("KoLeo", "reduce-scatter", times, size)]
    parts = shards(option, world_size)
    return [
        Traffic(*row, sent_per_rank(row[1], row[3], parts if "shards" in row[0] else world_size))
        for row in rows
    ]


def _sharded(work: Workload, option: Option, parts: int) -> list[tuple]:
    """What FSDP2 gathers and reduces; shards are padded to equal sizes."""
    times, student = work.accumulate, work.networks["student"]
    # The EMA teacher of a distillation follows the student, but does not look at images.
    seen = [
        network
        for name, network in work.networks.items()
        if name != "teacher" or work.teacher is None
    ]
    values = parts * sum(network.local(parts) for network in seen)
    calls, whole = sum(len(network.units) for network in seen), parts * student.local(parts)
    # Blocks that run once for each kind of crops are gathered as often, if they do not stay so. The
    # first, whose images have no gradient, stays so from its first backward pass on.
    again = work.backbone.passes(work.student_crops) - 1 if option.reshard else 0
    again_calls = again * student.num_parts
    first, *others = (
        again * parts * each.local(parts) for each in student.units[: student.num_parts]
    )
    trained = sum(any(trained for _, trained in unit.params) for unit in student.units)
    reduced = times if option.reduce_every else 1
    rows = [
        (
            "parameters in shards, forward",
            "all-gather",
            times * (calls + again_calls),
            times * (values + first + sum(others)) * option.param_bytes,
        ),
        (
            "parameters in shards, backward",
            "all-gather",
            times * (len(student.units) + again_calls - again),
            times * (whole + sum(others)) * option.param_bytes,
        ),
        (
            "gradients in shards",
            "reduce-scatter",
            reduced * trained,
            reduced * whole * option.reduce_bytes,
        ),
    ]
    if not option.reshard:
        del rows[1]
    if option.num_replicas > 1:
        size = whole // parts * option.reduce_bytes
        rows.append(("gradients of the replicas", "all-reduce", trained, size))
    return rows


def _sinkhorn(work: Workload, option: Option, world_size: int) -> tuple[int, int]:
    """Calls and bytes: one vector of prototypes for the peaks and one per round, or two per round
    and chunk.
    """
    prototypes = [head.num_prototypes for head in (work.dino_head, work.ibot_head)]
    vectors = FP32 * work.accumulate * sum(prototypes)
    if option.chunk_size is None:
        rounds = 1 + SINKHORN_ROUNDS
        return work.accumulate * len(prototypes) * rounds, rounds * vectors
    if world_size == 1:
        return 0, 0
    rounds = 2 * SINKHORN_ROUNDS
    chunks = sum(-(-count // option.chunk_size) for count in prototypes)
    return work.accumulate * rounds * chunks, rounds * vectors
