"""The predicted peak of a step: the fullest of the moments at which memory tops out."""

from dataclasses import dataclass

from . import activations as act
from .options import Option
from .prototypes import ComparisonMemory, comparison_memory
from .state import gradients, local_values, resident, shards
from .workload import Workload, numel

FP32 = 4


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
    base = sum(state.values())
    grads = gradients(work, option, world_size)
    later = 0 if option.strategy == "ddp" else grads
    # Gradients of the earlier micro batches.
    before = later if work.accumulate > 1 else 0
    compared = comparison_memory(work, option.chunk_size, on_gpu=on_gpu)
    kept = _student(work, option, on_gpu=on_gpu)
    images = _images(work)
    gathered = gathered_memory(work, option, backward=True)
    moments = {
        "teacher's forward pass": _teacher(work, option),
        "teacher's targets": compared.teacher,
        "losses": kept.total + compared.targets + compared.logits + compared.losses + _gram(work),
        "backward pass of the prototypes": kept.total + compared.logits + compared.backward
        + _gram(work) // 2 + gathered,
        "backward pass of the blocks": _blocks(work, option, kept, on_gpu=on_gpu)
        + _head_gradients(work, option, world_size) + gathered,
        "end of the backward pass": kept.embedding + kept.block + kept.working + later + gathered,
        "EMA update": local_values(work.networks["teacher"], shards(option, world_size)) * FP32
        if on_gpu
        else 0,
    }
    moments = {
        name: base + size + (before + images if "update" not in name else 0)
        for name, size in moments.items()
    }
    moments["end of the backward pass"] -= before
    return MemoryPlan(
        state,
        grads,
        kept.total,
        compared.logits + max(compared.targets + compared.losses, compared.backward),
        gathered,
        moments,
    )


@dataclass(frozen=True)
class _Kept:
    """What the student keeps: of the blocks together and of each, of the rest."""

    blocks: int
    block: int
    working: int
    embedding: int
    norm: int
    heads: int
    casts: int

    @property
    def total(self) -> int:
        return self.blocks + self.embedding + self.norm + self.heads + self.casts


def _student(work: Workload, option: Option, *, on_gpu: bool) -> _Kept:
    vit, sequences, width = work.backbone, work.student_sequences, work.width
    per_block = act.block_kept(vit, sequences, width, option.recompute, on_gpu=on_gpu)
    casts = 0
    if width < FP32 and not (option.is_sharded and option.param_bytes == width):
        # Autocast keeps a 16-bit copy of every weight matrix for the backward pass.
        casts = work.networks["student"].weights * width
    cls_rows = work.num_global + work.num_local
    heads = act.head_kept(work.dino_head, cls_rows, width, gathered_input=True)
    heads += act.head_kept(work.ibot_head, work.crops.num_masked, width, gathered_input=True)
    patches = sum(i * (t - vit.num_prefix) for i, t in sequences[:1]) * vit.dims * width
    return _Kept(
        per_block * vit.num_layers,
        act.block_saved(vit, sequences, width, on_gpu=on_gpu),
        act.block_working(vit, sequences, width, grad=True),
        act.embedding_kept(vit, sequences, width, cast=width < FP32),
        act.final_norm_kept(vit, sequences, width, on_gpu=on_gpu)
        + (patches if work.gram is not None else 0),
        heads,
        casts,
    )


def _images(work: Workload) -> int:
    """Images as bytes and as normalised fp32."""
    return work.pixels * (1 + FP32)


def _blocks(work: Workload, option: Option, kept: _Kept, *, on_gpu: bool) -> int:
    """The last block's turn in the backward pass: all is kept still, heads are done."""
    again = kept.block if option.recompute else 0
    return kept.blocks + kept.embedding + kept.casts + again + kept.working


def _teacher(work: Workload, option: Option) -> int:
    """Forward pass without gradients of the largest teacher."""
    largest = 0
    backbone = work.backbone if work.teacher is None else work.teacher[0]
    for vit, sequences in ((backbone, work.teacher_sequences), (work.backbone, work.gram_sequences)):
        if sequences:
            stream = act.tokens_of(sequences) * vit.dims * work.width
            largest = max(
                largest, stream + act.block_working(vit, sequences, work.width, grad=False)
            )
    return largest + gathered_memory(work, option, backward=False)


def _gram(work: Workload) -> int:
    """Gram term: normalised tokens of both sides and three matrices of similarities, in fp32."""
    if work.gram is None:
        return 0
    images, tokens = work.student_sequences[0]
    tokens -= work.backbone.num_prefix
    return FP32 * images * (4 * tokens * work.backbone.dims + 3 * tokens**2)


def _head_gradients(work: Workload, option: Option, world_size: int) -> int:
    """Gradients that exist when the backward pass reaches the blocks; DDP's lie in its buckets."""
    if option.strategy == "ddp":
        return 0
    parts = shards(option, world_size)
    unit_sizes = [
        sum(-(-shape[0] // parts) * numel(shape[1:]) if parts > 1 else numel(shape)
            for shape, trained in unit if trained)
        for unit in work.networks["student"].units[-2:]
    ]
    return FP32 * sum(unit_sizes)


def gathered_memory(work: Workload, option: Option, *, backward: bool) -> int:
    """Gathered parameters of two units and the buffer of the next; in the backward pass also a
    unit's gradients as they are made and as they are reduced.
    """
    if not option.is_sharded:
        return 0
    student = work.networks["student"].units
    everything = [unit for network in work.networks.values() for unit in network.units]
    largest = max(_values(unit) for unit in everything)
    held = sum(map(_values, student if backward else everything)) if not option.reshard else 0
    if option.reshard:
        held = 2 * largest
    size = (held + largest) * option.param_bytes
    if backward:
        own = max(_values(unit) for unit in student)
        size += own * (option.param_bytes + option.reduce_bytes)
    return size


def _values(unit: tuple) -> int:
    return sum(numel(shape) for shape, _ in unit)
