"""Memory of what compares student and teacher: logits, targets, and their gradients.

Whole: the student's logits (c bytes each) stay until their backward pass, the teacher's targets in
fp32 until the loss is taken. Chunked: bottleneck features and a copy of the prototypes instead, and
scratch matrices of chunk_size columns.
"""

from dataclasses import dataclass

from .workload import Head, Workload

FP32 = 4
# Elements that the cross-entropy handles at a time on a GPU, and on a CPU.
GPU_PIECE = 1 << 27
CPU_PIECE = 1 << 17


@dataclass(frozen=True)
class ComparisonMemory:
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


def comparison_memory(work: Workload, chunk_size: int | None, *, on_gpu: bool) -> ComparisonMemory:
    """Memory of both comparisons of a micro batch."""
    cls_rows, patch_rows = work.num_global + work.num_local, work.crops.num_masked
    if chunk_size is None:
        return _whole(work, cls_rows, patch_rows, on_gpu=on_gpu)
    return _chunked(work, cls_rows, patch_rows, chunk_size)


def _whole(work: Workload, cls_rows: int, patch_rows: int, *, on_gpu: bool) -> ComparisonMemory:
    width, images = work.width, work.crops.images
    k_cls, k_patch = work.dino_head.num_prototypes, work.ibot_head.num_prototypes
    piece = GPU_PIECE if on_gpu else CPU_PIECE
    teacher_logits = (work.num_global * k_cls + patch_rows * k_patch) * width
    patch_targets = FP32 * patch_rows * k_patch
    cls_targets = FP32 * work.num_global * k_cls
    # Sum over the two teacher crops; for the global crops one without the crop itself.
    summed = FP32 * images * k_cls
    without_self = FP32 * work.num_global * k_cls
    logits = (cls_rows * k_cls + patch_rows * k_patch) * width
    # Scaled logits and their product with the targets.
    scratch = 2 * FP32 * min(max(patch_rows * k_patch, work.num_local * k_cls), piece)
    patch_grad = patch_rows * k_patch * width
    cls_grad = cls_rows * k_cls * width
    first = summed + without_self + patch_targets + patch_grad + scratch // 2
    # Both gradients of the CLS logits, joined; the logits of patches are gone by then.
    joined = summed + without_self + patch_grad + 2 * cls_grad - patch_rows * k_patch * width
    return ComparisonMemory(
        targets=patch_targets + cls_targets,
        teacher=teacher_logits + patch_targets + cls_targets,
        logits=logits,
        losses=summed + without_self + scratch,
        patch_targets=patch_targets,
        left=patch_targets + summed + without_self,
        backward=first,
        joined=joined,
    )


def _chunked(work: Workload, cls_rows: int, patch_rows: int, chunk_size: int) -> ComparisonMemory:
    width = work.width
    heads = ((work.dino_head, cls_rows), (work.ibot_head, patch_rows))
    copies = sum(_prototypes(head) * width for head, _ in heads)
    vectors = FP32 * sum(head.num_prototypes for head, _ in heads)
    targets = copies + vectors
    # Logits in the compute dtype and in fp32, wanted and teacher probabilities.
    piece = max(rows * min(chunk_size, head.num_prototypes) for head, rows in heads)
    scratch = piece * (width + 3 * FP32)
    grads = max(_prototypes(head) for head, _ in heads) * width
    return ComparisonMemory(
        targets=targets,
        teacher=targets + piece * (width + 2 * FP32),
        logits=copies,
        losses=scratch,
        patch_targets=targets,
        left=targets,
        backward=scratch + piece * width + copies + grads,
        joined=copies + grads,
    )


def _prototypes(head: Head) -> int:
    return head.num_prototypes * head.bottleneck
