"""Memory that stays from step to step: parameters, gradients, optimizer state, teachers."""

from .options import Option
from .workload import Network, Workload, numel

FP32 = 4
# Adam keeps two moments of the size of a parameter, and a step count for each parameter tensor.
MOMENTS = 2


def shards(option: Option, world_size: int) -> int:
    """Ranks that share the parameters."""
    return world_size // option.num_replicas if option.is_sharded else 1


def local_numel(shape: tuple[int, ...], num_shards: int) -> int:
    """Values of a parameter on the first rank: FSDP2 cuts the first axis and rounds up."""
    if num_shards == 1:
        return numel(shape)
    return -(-shape[0] // num_shards) * numel(shape[1:])


def local_values(network: Network, num_shards: int, *, trained: bool = False) -> int:
    """Values of a network on the first rank; of the trained parameters only if asked."""
    return sum(
        local_numel(shape, num_shards)
        for unit in network.units
        for shape, requires_grad in unit
        if requires_grad or not trained
    )


def num_trained_tensors(network: Network) -> int:
    """Trained parameter tensors."""
    return sum(requires_grad for unit in network.units for _, requires_grad in unit)


def resident(work: Workload, option: Option, world_size: int) -> dict[str, int]:
    """Bytes on the first rank between two steps, by kind."""
    parts = shards(option, world_size)
    student = work.networks["student"]
    sizes = {name: FP32 * local_values(network, parts) for name, network in work.networks.items()}
    moments = MOMENTS * FP32 * local_values(student, parts, trained=True)
    sizes["optimizer"] = moments + FP32 * num_trained_tensors(student)
    if option.strategy == "ddp":
        sizes["gradients"] = gradients(work, option, world_size)
    return sizes


def waiting_gradients(work: Workload, option: Option, world_size: int) -> int:
    """Bytes of the gradients of earlier micro batches of the step: whole ones under FSDP2, unless
    those of every micro batch are reduced.
    """
    if work.accumulate == 1:
        return 0
    if option.is_sharded and not option.reduce_every:
        return option.reduce_bytes * work.networks["student"].num_trained
    return gradients(work, option, world_size)


def gradients(work: Workload, option: Option, world_size: int) -> int:
    """Bytes of the gradients of a step, which DDP keeps in its buckets between steps."""
    return FP32 * local_values(work.networks["student"], shards(option, world_size), trained=True)
