"""What the ranks send each other in a step, from shapes."""

from typing import NamedTuple

from dinov3_mm.engine.dry_run.collectives import sent_per_rank

from .options import Option
from .state import local_numel, shards
from .workload import Network, Workload

FP32 = 4
SINKHORN_ROUNDS = 3


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
    rows = _sharded(work, option, world_size) if option.is_sharded else _replicated(work)
    times = work.accumulate
    rows += [("Sinkhorn-Knopp", "all-reduce", *_sinkhorn(work, option, world_size))]
    if work.koleo_over_ranks and world_size > 1:
        size = FP32 * work.num_global * work.backbone.dims * world_size * times
        rows += [("KoLeo", "all-gather", times, size), ("KoLeo", "reduce-scatter", times, size)]
    parts = shards(option, world_size)
    return [
        Traffic(*row, sent_per_rank(row[1], row[3], parts if "shards" in row[0] else world_size))
        for row in rows
    ]


def _replicated(work: Workload) -> list[tuple]:
    # Once per step, whatever the number of micro batches.
    size = FP32 * work.networks["student"].num_trained
    return [("gradients", "all-reduce", None, size)]


def _sharded(work: Workload, option: Option, world_size: int) -> list[tuple]:
    parts, times = shards(option, world_size), work.accumulate
    student = work.networks["student"]
    forward = backward = calls = 0
    for name, network in work.networks.items():
        if name == "teacher" and work.teacher is not None:
            continue  # follows the student, but does not look at images
        forward += parts * padded_values(network, parts) * option.param_bytes
        calls += len(network.units)
    whole = parts * padded_values(student, parts)
    backward = whole * option.param_bytes if option.reshard else 0
    trained = sum(any(trained for _, trained in unit) for unit in student.units)
    reduced = times if option.reduce_every else 1
    rows = [
        ("parameters in shards, forward", "all-gather", times * calls, times * forward),
        (
            "gradients in shards",
            "reduce-scatter",
            reduced * trained,
            reduced * whole * option.reduce_bytes,
        ),
    ]
    if backward:
        row = ("parameters in shards, backward", "all-gather", times * len(student.units))
        rows.insert(1, (*row, times * backward))
    if option.num_replicas > 1:
        size = whole // parts * option.reduce_bytes
        rows.append(("gradients of the replicas", "all-reduce", trained, size))
    return rows


def padded_values(network: Network, num_shards: int) -> int:
    """Values of a rank's shards with their padding."""
    return sum(local_numel(shape, num_shards) for unit in network.units for shape, _ in unit)


def _sinkhorn(work: Workload, option: Option, world_size: int) -> tuple[int, int]:
    """Calls and bytes: one vector of prototypes for the peaks and one per round, or two per round
    and chunk.
    """
    heads = (work.dino_head, work.ibot_head)
    vector = FP32 * sum(head.num_prototypes for head in heads)
    if option.chunk_size is None:
        return work.accumulate * 2 * (1 + SINKHORN_ROUNDS), work.accumulate * (
            1 + SINKHORN_ROUNDS
        ) * vector
    if world_size == 1:
        return 0, 0
    chunks = sum(-(-head.num_prototypes // option.chunk_size) for head in heads)
    rounds = 2 * SINKHORN_ROUNDS
    return work.accumulate * rounds * chunks, work.accumulate * rounds * vector
