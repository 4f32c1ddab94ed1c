"""The predicted peak of a step: the fullest of the moments at which memory tops out. In bytes."""

from dataclasses import dataclass

from .backbones import Backbone, Crops, Group
from .options import Option
from .workload import Head, Unit, Workload

FP32 = 4
NUM_HEADS = 2
# Adam keeps two moments of the size of a parameter, and a step count for each parameter tensor.
MOMENTS = 2
# Elements that the cross-entropy handles at a time on a GPU, and on a CPU.
GPU_PIECE = 1 << 27
CPU_PIECE = 1 << 17


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
    state, grads = resident(work, option, world_size), gradients(work, option, world_size)
    kept = _student(work, option, on_gpu=on_gpu)
    whole = option.chunk_size is None
    compared = _whole(work, on_gpu=on_gpu) if whole else _chunked(work, option.chunk_size)
    gathered = {part: _gathered(work, option, part) for part in ("forward", "blocks", "heads")}

    teacher = work.backbone if work.teacher is None else work.teacher[0]
    forward = kept.total + compared.targets + compared.logits
    gram = forward + compared.left - compared.patch_targets
    backward = kept.total + compared.logits
    moments = {
        "teacher's forward pass": _teacher(work, teacher, work.teacher_crops) + gathered["forward"],
        "teacher's targets": compared.teacher,
        "student's forward pass": forward + kept.cached_casts + gathered["forward"],
        "losses": forward + compared.losses,
    }
    if work.gram is not None:
        moments["Gram teacher's forward pass"] = gram
        if work.gram_crops:
            moments["Gram teacher's forward pass"] += (
                _teacher(work, work.backbone, work.gram_crops) + gathered["forward"]
            )
        moments["Gram term"] = gram + _gram(work, 3)
        moments["backward pass of the Gram term"] = backward + compared.left + _gram(work, 5)
    moments |= {
        "backward pass of the losses": backward + compared.backward,
        "backward pass of the heads": backward + compared.joined + gathered["heads"],
        "backward pass of the blocks": kept.casts
        + max(
            kept.up_to(index) + group.again(option.recompute) + group.working
            for index, group in enumerate(kept.groups)
        )
        + _head_gradients(work, option, world_size)
        + gathered["blocks"],
    }
    # DDP keeps those outside of its buckets.
    waiting = _waiting_gradients(work, option, world_size)
    first = kept.groups[0]
    end = first.entry + first.saved + first.working + gathered["blocks"] - waiting
    moments["end of the backward pass"] = end + max(
        waiting, 0 if option.strategy == "ddp" else grads
    )
    # Images as bytes and as normalised fp32 are there all the time.
    base = sum(state.values()) + work.pixels * (1 + FP32) + waiting
    return MemoryPlan(
        state,
        grads,
        kept.total,
        compared.logits
        + max(compared.targets + compared.losses, compared.backward, compared.joined),
        max(gathered.values()),
        {name: base + size for name, size in moments.items()},
    )


# What stays from step to step: parameters, gradients, optimizer state, teachers.


def shards(option: Option, world_size: int) -> int:
    """Ranks that share the parameters."""
    return world_size // option.num_replicas if option.is_sharded else 1


def resident(work: Workload, option: Option, world_size: int) -> dict[str, int]:
    """Bytes on the first rank between two steps, by kind."""
    parts, student = shards(option, world_size), work.networks["student"]
    sizes = {name: FP32 * network.local(parts) for name, network in work.networks.items()}
    moments = MOMENTS * FP32 * student.local(parts, trained=True)
    sizes["optimizer"] = moments + FP32 * student.num_trained_tensors
    if option.strategy == "ddp":
        sizes["gradients"] = gradients(work, option, world_size)
    return sizes


def gradients(work: Workload, option: Option, world_size: int) -> int:
    """Bytes of the gradients of a step, which DDP keeps in its buckets between steps."""
    return FP32 * work.networks["student"].local(shards(option, world_size), trained=True)


def _waiting_gradients(work: Workload, option: Option, world_size: int) -> int:
    """Gradients of earlier micro batches of the step: whole ones under FSDP2, unless those of every
    micro batch are reduced.
    """
    if work.accumulate == 1:
        return 0
    if option.is_sharded and not option.reduce_every:
        return option.reduce_bytes * work.networks["student"].local(1, trained=True)
    return gradients(work, option, world_size)


def _head_gradients(work: Workload, option: Option, world_size: int) -> int:
    """Gradients that exist when the backward pass reaches the blocks; DDP's lie in its buckets."""
    if option.strategy == "ddp":
        return 0
    heads, parts = work.networks["student"].units[-NUM_HEADS:], shards(option, world_size)
    return FP32 * sum(unit.local(parts, trained=True) for unit in heads)


def _gathered(work: Workload, option: Option, part: str) -> int:
    """Most bytes of gathered parameters and of gradients in flight, in the 'forward' pass or in the
    backward pass of the 'blocks' or 'heads'.

    While a unit works, the next one has been gathered and the buffer of the collective after it is
    there. In the backward pass come the unit's gradients as they are made and as they are reduced.
    """
    if not option.is_sharded:
        return 0
    units: dict[str, tuple[Unit, ...]] = {
        "forward": tuple(unit for network in work.networks.values() for unit in network.units),
        "blocks": work.networks["student"].units[:-NUM_HEADS],
        "heads": work.networks["student"].units[-NUM_HEADS:],
    }
    largest = max(unit.numel for unit in units[part])
    values = 3 * largest if option.reshard else work.networks["student"].local(1) + largest
    flying = 0 if part == "forward" else largest * (option.param_bytes + option.reduce_bytes)
    return values * option.param_bytes + flying


# What the networks keep for the backward pass, or hold while they run.


@dataclass(frozen=True)
class _Kept:
    """What the student keeps: of its blocks, of norm and heads; the copies of weights that a
    backward pass needs, and the others that last as long as the forward pass.
    """

    groups: list[Group]
    recompute: bool | str
    ends: int
    casts: int
    cached_casts: int

    def up_to(self, last: int) -> int:
        """What the groups up to this one keep, with what comes before each."""
        groups = self.groups[: last + 1]
        return sum(each.count * each.kept(self.recompute) + each.entry for each in groups)

    @property
    def total(self) -> int:
        return self.up_to(len(self.groups)) + self.ends + self.casts


def _student(work: Workload, option: Option, *, on_gpu: bool) -> _Kept:
    backbone, crops, width = work.backbone, work.student_crops, work.width
    block_casts = head_casts = cached_casts = 0
    if width < FP32 and not (option.is_sharded and option.param_bytes == width):
        # Autocast keeps a 16-bit copy of every weight matrix for the backward pass; of blocks that
        # are recomputed, of one at a time.
        network = work.networks["student"]
        weights = [unit.weights * width for unit in network.units]
        blocks = weights[: network.num_parts]
        block_casts = max(blocks) if option.recompute else sum(blocks)
        cached_casts = sum(blocks) - block_casts
        head_casts = sum(weights[network.num_parts :])
    # The final norm, and what the Gram term compares.
    norm_input = FP32 if on_gpu else width
    tokens = sum(images * backbone.tokens(side) for images, side in crops)
    ends = tokens * (backbone.dims * (norm_input + width) + 2 * FP32)
    if work.gram is not None:
        images, patches = work.gram_rows
        ends += images * patches * backbone.dims * width
    ends += _head(work.dino_head, work.num_global + work.num_local, width)
    ends += _head(work.ibot_head, work.crops.num_masked, width)
    return _Kept(
        backbone.groups(crops, width, on_gpu=on_gpu),
        option.recompute,
        ends + head_casts,
        block_casts,
        cached_casts,
    )


def _head(head: Head, rows: int, width: int) -> int:
    """What a head keeps up to the bottleneck: its input, two matrices for each hidden layer, and
    the bottleneck before and after its normalisation.
    """
    hidden = sum(head.widths[1:-1])
    # Autocast divides by an fp32 norm, and the next product takes a 16-bit copy.
    normalised = 2 if width == FP32 else 4
    return rows * (head.widths[0] + 2 * hidden + normalised * head.bottleneck) * width


def _teacher(work: Workload, backbone: Backbone, crops: tuple[Crops, ...]) -> int:
    """Forward pass of a teacher."""
    groups = backbone.groups(crops, work.width, on_gpu=True, grad=False)
    return max(group.stream + group.forward for group in groups)


def _gram(work: Workload, matrices: int) -> int:
    """Gram term in fp32: tokens of both sides before and after normalisation, and this many
    matrices of similarities.
    """
    count, patches = work.gram_rows
    return FP32 * count * (4 * patches * work.backbone.dims + matrices * patches**2)


# What compares student and teacher: logits, targets, and their gradients. Whole: the student's
# logits stay until their backward pass, the teacher's targets in fp32 until the loss is taken. In
# chunks: bottleneck features and a copy of the prototypes instead, and scratch matrices of
# chunk_size columns.


@dataclass(frozen=True)
class _Compared:
    """Bytes at the moments that may be the fullest.

    Attributes:
        targets: the teacher's, while the student runs.
        teacher: most while the teacher's scores are centred, beside nothing.
        logits: of the student, kept for the backward pass.
        losses: most while the losses are taken, beside targets and logits.
        patch_targets: the part of ``targets`` that stays for the backward pass.
        left: that and what else the losses keep.
        backward: most while the gradients of the losses are taken, beside the logits.
        joined: most while those of the last layers are, beside the logits.
    """

    targets: int
    teacher: int
    logits: int
    losses: int
    patch_targets: int
    left: int
    backward: int
    joined: int


def _whole(work: Workload, *, on_gpu: bool) -> _Compared:
    width, k_cls = work.width, work.dino_head.num_prototypes
    patches = work.crops.num_masked * work.ibot_head.num_prototypes
    patch_targets, cls_targets = FP32 * patches, FP32 * work.num_global * k_cls
    # Sum over the two teacher crops; for the global crops one without the crop itself.
    summed = FP32 * work.crops.images * k_cls + cls_targets
    cls = (work.num_global + work.num_local) * k_cls
    # Scaled logits and their product with the targets.
    piece = GPU_PIECE if on_gpu else CPU_PIECE
    scratch = 2 * FP32 * min(max(patches, work.num_local * k_cls), piece)
    return _Compared(
        targets=patch_targets + cls_targets,
        teacher=(work.num_global * k_cls + patches) * width + patch_targets + cls_targets,
        logits=(cls + patches) * width,
        losses=summed + scratch,
        patch_targets=patch_targets,
        left=patch_targets + summed,
        backward=summed + patch_targets + patches * width + scratch // 2,
        # Both gradients of the CLS logits, joined; the logits of patches are gone by then.
        joined=summed + 2 * cls * width,
    )


def _chunked(work: Workload, chunk_size: int) -> _Compared:
    width = work.width
    heads = (
        (work.dino_head, work.num_global + work.num_local),
        (work.ibot_head, work.crops.num_masked),
    )
    prototypes = [head.num_prototypes * head.bottleneck * width for head, _ in heads]
    copies, grads = sum(prototypes), max(prototypes)
    targets = copies + FP32 * sum(head.num_prototypes for head, _ in heads)
    # Logits in the compute dtype and in fp32, wanted and teacher probabilities.
    piece = max(rows * min(chunk_size, head.num_prototypes) for head, rows in heads)
    scratch = piece * (width + 3 * FP32)
    return _Compared(
        targets=targets,
        teacher=targets + piece * (width + 2 * FP32),
        logits=copies,
        losses=scratch,
        patch_targets=targets,
        left=targets,
        backward=scratch + piece * width + copies + grads,
        joined=copies + grads,
    )
