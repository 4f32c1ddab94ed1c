"""The predicted peak of a step: the fullest of the moments at which memory tops out."""

from dataclasses import dataclass

from . import activations as act
from .options import Option
from .prototypes import ComparisonMemory, comparison_memory
from .state import gradients, local_numel, resident, shards, waiting_gradients
from .workload import Sequence, Transformer, Workload, numel

FP32 = 4
NUM_HEADS = 2


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted memory of the first rank.

    Attributes:
        resident: bytes between two steps, by kind.
        gradients: bytes of the gradients.
        activations: bytes that the student keeps for its backward pass, without prototypes.
        prototypes: most bytes of logits, targets and their gradients.
        gathered: most bytes of gathered parameters and of gradients in flight.
        moments: bytes of everything at each moment that may be the fullest.
    """

    resident: dict[str, int]
    gradients: int
    activations: int
    prototypes: int
    gathered: int
    moments: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return max(self.moments.values())

    @property
    def fullest(self) -> str:
        """Name of the fullest moment."""
        return max(self.moments, key=self.moments.get)


def plan_memory(
    work: Workload, option: Option, world_size: int, *, on_gpu: bool = True
) -> MemoryPlan:
    """Predict the memory of a step on the first rank.

    Args:
        work: shapes of the step.
        option: how it is run.
        world_size: ranks.
        on_gpu: of the paths on a GPU; otherwise of those on a CPU.
    """
    state = resident(work, option, world_size)
    grads = gradients(work, option, world_size)
    compared = comparison_memory(work, option.chunk_size, on_gpu=on_gpu)
    kept = _student(work, option, on_gpu=on_gpu)
    moments = {
        **_forward_moments(work, option, kept, compared),
        **_backward_moments(work, option, kept, compared, world_size),
    }
    # DDP keeps those outside of its buckets.
    waiting = waiting_gradients(work, option, world_size)
    extra = _images(work) + waiting
    moments = {name: size + extra for name, size in moments.items()}
    moments["end of the backward pass"] = (
        _images(work)
        + kept.embedding
        + kept.block
        + kept.working
        + max(waiting, 0 if option.strategy == "ddp" else grads)
        + gathered_memory(work, option, "blocks")
    )
    base = sum(state.values())
    return MemoryPlan(
        state,
        grads,
        kept.total,
        compared.logits
        + max(compared.targets + compared.losses, compared.backward, compared.joined),
        max(gathered_memory(work, option, part) for part in ("forward", "blocks", "heads")),
        {name: base + size for name, size in moments.items()},
    )


def _forward_moments(
    work: Workload, option: Option, kept: "_Kept", compared: ComparisonMemory
) -> dict[str, int]:
    backbone = work.backbone if work.teacher is None else work.teacher[0]
    student = kept.total + compared.targets + compared.logits
    return {
        "teacher's forward pass": _teacher(work, option, backbone, work.teacher_sequences),
        "teacher's targets": compared.teacher,
        "student's forward pass": student
        + kept.cached_casts
        + gathered_memory(work, option, "forward"),
        "losses": student + compared.losses,
        "Gram teacher's forward pass": student
        + compared.left
        - compared.patch_targets
        + _teacher(work, option, work.backbone, work.gram_sequences),
        "Gram term": student + compared.left - compared.patch_targets + _gram(work, 3),
    }


def _backward_moments(
    work: Workload, option: Option, kept: "_Kept", compared: ComparisonMemory, world_size: int
) -> dict[str, int]:
    student = kept.total + compared.logits
    return {
        "backward pass of the Gram term": student + compared.left + _gram(work, 5),
        "backward pass of the losses": student + compared.backward,
        "backward pass of the heads": student
        + compared.joined
        + gathered_memory(work, option, "heads"),
        # Heads are done, all blocks are still to come.
        "backward pass of the blocks": kept.blocks
        + kept.embedding
        + kept.casts
        + kept.again
        + kept.working
        + _head_gradients(work, option, world_size)
        + gathered_memory(work, option, "blocks"),
    }


@dataclass(frozen=True)
class _Kept:
    """What the student keeps: of the blocks together, of each, of the rest; the copies of weights
    that a backward pass needs, and the others that last as long as the forward pass.
    """

    blocks: int
    block: int
    again: int
    working: int
    embedding: int
    norm: int
    heads: int
    casts: int
    cached_casts: int

    @property
    def total(self) -> int:
        return self.blocks + self.embedding + self.norm + self.heads + self.casts


def _student(work: Workload, option: Option, *, on_gpu: bool) -> _Kept:
    vit, sequences, width = work.backbone, work.student_sequences, work.width
    per_block = act.block_input(vit, sequences, width)
    if not option.recompute:
        per_block = act.block_saved(vit, sequences, width, on_gpu=on_gpu)
    elif option.recompute == "selective":
        per_block += act.block_products(vit, sequences, width, on_gpu=on_gpu)
    block_casts = head_casts = cached_casts = 0
    if width < FP32 and not (option.is_sharded and option.param_bytes == width):
        # Autocast keeps a 16-bit copy of every weight matrix for the backward pass; of blocks that
        # are recomputed, of one at a time.
        weights = work.networks["student"].weights
        per_unit = weights[:1] if option.recompute else weights[: vit.num_layers]
        block_casts = sum(per_unit) * width
        cached_casts = sum(weights[: vit.num_layers]) * width - block_casts
        head_casts = sum(weights[vit.num_layers :]) * width
    cls_rows = work.num_global + work.num_local
    heads = act.head_kept(work.dino_head, cls_rows, width)
    heads += act.head_kept(work.ibot_head, work.crops.num_masked, width)
    patches = sum(i * (t - vit.num_prefix) for i, t in sequences[:1]) * vit.dims * width
    return _Kept(
        per_block * vit.num_layers,
        act.block_saved(vit, sequences, width, on_gpu=on_gpu),
        act.block_recomputed(vit, sequences, width, option.recompute, on_gpu=on_gpu),
        act.block_working(vit, sequences, width, grad=True),
        act.embedding_kept(vit, sequences, width),
        act.final_norm_kept(vit, sequences, width, on_gpu=on_gpu)
        + (patches if work.gram is not None else 0),
        heads + head_casts,
        block_casts,
        cached_casts,
    )


def _images(work: Workload) -> int:
    """Images as bytes and as normalised fp32."""
    return work.pixels * (1 + FP32)


def _teacher(
    work: Workload, option: Option, vit: Transformer, sequences: tuple[Sequence, ...]
) -> int:
    """Forward pass of a teacher."""
    if not sequences:
        return 0
    stream = act.tokens_of(sequences) * vit.dims * work.width
    working = act.block_working(vit, sequences, work.width, grad=False)
    return stream + working + gathered_memory(work, option, "forward")


def _gram(work: Workload, matrices: int) -> int:
    """Gram term in fp32: tokens of both sides before and after normalisation, and this many
    matrices of similarities.
    """
    if work.gram is None:
        return 0
    images, tokens = work.student_sequences[0]
    tokens -= work.backbone.num_prefix
    values = 4 * images * tokens * work.backbone.dims
    if not work.gram_by_image:
        images, tokens = 1, images * tokens
    return FP32 * (values + matrices * images * tokens**2)


def _head_gradients(work: Workload, option: Option, world_size: int) -> int:
    """Gradients that exist when the backward pass reaches the blocks; DDP's lie in its buckets."""
    if option.strategy == "ddp":
        return 0
    parts = shards(option, world_size)
    heads = work.networks["student"].units[-NUM_HEADS:]
    return FP32 * sum(
        local_numel(shape, parts) for unit in heads for shape, trained in unit if trained
    )


def gathered_memory(work: Workload, option: Option, part: str) -> int:
    """Most bytes of gathered parameters and of gradients in flight.

    While a unit works, the next one has been gathered and the buffer of the collective after it is
    there. In the backward pass come the unit's gradients as they are made and as they are reduced.

    Args:
        work: shapes of the step.
        option: how it is run.
        part: 'forward', or the backward pass of the 'blocks' or of the 'heads'.
    """
    if not option.is_sharded:
        return 0
    student = [_values(unit) for unit in work.networks["student"].units]
    if part == "forward":
        largest = max(_values(u) for network in work.networks.values() for u in network.units)
    else:
        largest = max(student[:-NUM_HEADS] if part == "blocks" else student[-NUM_HEADS:])
    values = 3 * largest if option.reshard else sum(student) + largest
    flying = 0 if part == "forward" else largest * (option.param_bytes + option.reduce_bytes)
    return values * option.param_bytes + flying


def _values(unit: tuple) -> int:
    return sum(numel(shape) for shape, _ in unit)
