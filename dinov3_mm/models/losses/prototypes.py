"""Losses on prototypes: DINO on CLS tokens, iBOT on masked patches, whole and in chunks
(arXiv 2508.10104 section 3.2).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from .sinkhorn import fused

# --- Cross-entropy of logits and soft targets in little memory ---
#
# With up to 262,144 prototypes the logits are the largest tensors of a training step. Autograd's
# own chain (cast, divide, log-softmax, multiply, sum) keeps several float32 copies of them; this
# function keeps only the logits in the dtype in which the head produced them plus one number per
# row.


# Float32 elements handled at a time: on a CPU a piece that stays in its cache, on an accelerator
# pieces large enough to hide the launches (512 MiB of scratch memory).
CPU_CHUNK = 1 << 17
DEVICE_CHUNK = 1 << 27


def soft_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, temp: float) -> Tensor:
    """Weighted sum over rows of ``-sum_k targets[k] * log_softmax(logits / temp)[k]`` in float32.

    Args:
        logits: (S, R, K), any floating dtype; gradients flow here and nowhere else.
        targets: (S, R, K), or (1, R, K) for targets that the S entries share; rows of any sum.
        weights: float32, broadcastable to (S, R): weight of each row in the sum.
        temp: temperature that divides the logits.

    Returns:
        The sum as a float32 scalar.
    """
    return _SoftCrossEntropy.apply(logits, targets, weights, 1.0 / temp)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, weights: Tensor, scale: float) -> Tensor:
        rows = logits.shape[:2]
        log_norm = torch.empty(rows, device=logits.device)  # (S, R): log sum_k exp(scale * logit)
        mass = torch.empty(rows, device=logits.device)  # (S, R): sum_k target
        matched = torch.empty(rows, device=logits.device)  # (S, R): sum_k target * scaled logit
        for part in _row_slices(logits):
            statistics = _row_statistics(logits[:, part], targets[:, part], scale)
            log_norm[:, part], mass[:, part], matched[:, part] = statistics
        weights = weights.expand(rows)
        ctx.save_for_backward(logits, targets, weights, log_norm, mass)
        ctx.scale = scale
        return (weights * (mass * log_norm - matched)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        logits, targets, weights, log_norm, mass = ctx.saved_tensors
        row_factor = (weights * (grad_output * ctx.scale)).unsqueeze(-1)
        log_norm, mass = log_norm.unsqueeze(-1), mass.unsqueeze(-1)
        grad = torch.empty_like(logits)
        for part in _row_slices(logits):
            rows = (log_norm[:, part], mass[:, part], row_factor[:, part])
            _write_gradient(grad[:, part], logits[:, part], targets[:, part], *rows, ctx.scale)
        return grad, None, None, None


@fused
def _row_statistics(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Log normaliser, sum of targets and matched logits of each row (S, r)."""
    scaled = logits.to(torch.float32, copy=True).mul_(scale)
    if torch.compiler.is_compiling():  # a product of matrices would end the fusion
        matched = (scaled * targets).sum(-1)
    else:
        matched = torch.linalg.vecdot(scaled, targets.expand_as(scaled))
    peak = scaled.amax(-1, keepdim=True)
    total = scaled.sub_(peak).exp_().sum(-1)
    mass = targets.sum(-1).expand(logits.shape[:2])
    return peak.squeeze(-1) + total.log_(), mass, matched


@fused
def _write_gradient(
    out: Tensor,
    logits: Tensor,
    targets: Tensor,
    log_norm: Tensor,
    mass: Tensor,
    row_factor: Tensor,
    scale: float,
) -> None:
    """Write the gradient of the logits to ``out``."""
    piece = logits.to(torch.float32, copy=True).mul_(scale)
    piece.sub_(log_norm).exp_().mul_(mass).sub_(targets)
    out.copy_(piece.mul_(row_factor))


def _row_slices(logits: Tensor) -> list[slice]:
    """Split the second axis so that one piece holds about a chunk of elements."""
    entries, rows, classes = logits.shape
    chunk = CPU_CHUNK if logits.device.type == "cpu" else DEVICE_CHUNK
    step = max(1, chunk // max(1, entries * classes))
    return [slice(start, start + step) for start in range(0, rows, step)]


# --- DINO and iBOT ---


def dino_loss(
    student: Tensor, teacher: Tensor, *, student_temp: float = 0.1, ignore_diagonal: bool = False
) -> Tensor:
    """Mean cross-entropy of every (student crop, teacher crop) pair of the same image.

    The S*T pairs need no S*T products: the cross-entropy is linear in its targets, so each student
    crop is compared once with the sum of the teacher crops it is paired with.

    Args:
        student: (S, B, K) student logits, any floating dtype.
        teacher: (T, B, K) teacher probabilities.
        student_temp: temperature of the student softmax.
        ignore_diagonal: leave out the pairs that show the same crop to both (equal crop index).

    Returns:
        Float32 scalar: the mean over images and over the pairs that are kept.

    Raises:
        ValueError: shapes that do not belong together, or no pair left.
    """
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[1:] != teacher.shape[1:]:
        raise ValueError(
            "dino_loss expects student (S, B, K) and teacher (T, B, K) with equal B and K, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    shared = min(len(student), len(teacher)) if ignore_diagonal else 0
    num_pairs = len(student) * len(teacher) - shared
    if num_pairs == 0:
        raise ValueError(
            "dino_loss with ignore_diagonal=True has no pair left for "
            f"{len(student)} student and {len(teacher)} teacher crops; give more crops"
        )
    targets = teacher.float().sum(0, keepdim=True)  # (1, B, K)
    if ignore_diagonal:
        targets = targets.repeat(len(student), 1, 1)
        targets[:shared] -= teacher[:shared]
    weight = torch.full((1, 1), 1.0 / (student.shape[1] * num_pairs), device=student.device)
    return soft_cross_entropy(student, targets, weight, student_temp)


def ibot_loss(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    num_images: int,
    *,
    student_temp: float = 0.1,
) -> Tensor:
    """Cross-entropy of the masked patches, averaged per image and then over all images.

    Args:
        student: (M, K) student logits of the masked patches, any floating dtype.
        teacher: (M, K) teacher probabilities of the same patches.
        weights: (M,) 1 / (number of masked patches of the patch's image).
        num_images: divisor: all global-crop images of the batch, the unmasked ones included.
        student_temp: temperature of the student softmax.

    Returns:
        Float32 scalar; zero (with a graph) when no patch is masked.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if student.ndim != 2 or student.shape != teacher.shape or weights.shape != student.shape[:1]:
        raise ValueError(
            "ibot_loss expects student (M, K), teacher (M, K) and weights (M,), got "
            f"{tuple(student.shape)}, {tuple(teacher.shape)} and {tuple(weights.shape)}"
        )
    row_weights = weights.float() / num_images
    return soft_cross_entropy(student[None], teacher[None], row_weights[None], student_temp)


# --- Without the matrix of logits ---
#
# With K = 262,144 prototypes the logits of a batch are the largest tensors of a training step:
# those of the student, their gradient, and the teacher's assignments. Nothing needs them whole.
# Sinkhorn's assignments are ``exp(logit / temp + a_sample + b_prototype)``, so two vectors and the
# features describe them, and a cross-entropy is a sum over prototypes. The functions below visit
# the prototypes in chunks and recompute the logits of a chunk each time they are needed; a matrix
# product of width 256 costs less than the memory traffic of what it replaces.


class ChunkedAssignments(NamedTuple):
    """Teacher probabilities ``exp(features @ prototypes.T / temp + log_sample + log_prototype)``.

    Attributes:
        features: (n, b) normalised bottleneck features of the teacher.
        prototypes: (K, b) weights of the teacher's last layer.
        temp: teacher temperature.
        log_sample: (n,) float32.
        log_prototype: (K,) float32.
    """

    features: Tensor
    prototypes: Tensor
    temp: float | Tensor
    log_sample: Tensor
    log_prototype: Tensor

    def chunk(self, part: slice) -> Tensor:
        """Probabilities (n, c) float32 of the prototypes of a slice."""
        logits = _scaled_logits(self.features, self.prototypes[part], self.temp)
        return logits.add_(self.log_sample[:, None]).add_(self.log_prototype[part]).exp_()


@torch.no_grad()
def sinkhorn_assignments(
    features: Tensor,
    prototypes: Tensor,
    temp: float | Tensor,
    *,
    num_iters: int = 3,
    chunk_size: int = 8192,
    group: dist.ProcessGroup | None = None,
) -> ChunkedAssignments:
    """Sinkhorn-Knopp centring as by ``sinkhorn_knopp`` of the logits, in chunks of prototypes.

    Args:
        features: (n, b) bottleneck features of this rank's samples, n may be 0.
        prototypes: (K, b) weights of the last layer.
        temp: teacher temperature.
        num_iters: normalisation rounds, at least 1.
        chunk_size: prototypes handled at a time; scratch memory is n * chunk_size * 4 bytes.
        group: ranks that share the problem (default: all ranks, if a process group exists).

    Raises:
        ValueError: ``num_iters`` below 1.
    """
    if num_iters < 1:
        raise ValueError(f"sinkhorn_assignments needs num_iters >= 1, got {num_iters}")
    num_prototypes = len(prototypes)
    features = features.to(_compute_dtype(features))
    log_sample = features.new_zeros(len(features), dtype=torch.float32)
    log_prototype = features.new_empty(num_prototypes, dtype=torch.float32)
    for _ in range(num_iters):
        running = _RunningLogSum(len(features), features.device)
        for part in _slices(num_prototypes, chunk_size):
            logits = _scaled_logits(features, prototypes[part], temp)
            mass = torch.logsumexp(logits + log_sample[:, None], dim=0)
            log_prototype[part] = -_log_sum_over_ranks(mass, group)
            running.add(logits.add_(log_prototype[part]))
        log_sample = -running.value()
    return ChunkedAssignments(features, prototypes, temp, log_sample, log_prototype)


def chunked_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    targets: ChunkedAssignments,
    pairs: Tensor,
    weights: Tensor,
    temp: float,
    *,
    chunk_size: int = 8192,
) -> Tensor:
    """Weighted sum of cross-entropies between student crops and the teacher crops paired with them.

    Equals ``sum_{s,t,r} pairs[s,t] * weights[r] * H(p[t,r], softmax(features[s,r] @ W.T / temp))``.

    Args:
        features: (S, R, b) normalised bottleneck features of the student; gradients flow here.
        prototypes: (K, b) weights of the student's last layer; gradients flow here.
        targets: assignments of T * R samples, crop-major.
        pairs: (S, T) float32, 1 where a student crop learns from a teacher crop.
        weights: (R,) float32.
        temp: student temperature.
        chunk_size: prototypes handled at a time.

    Returns:
        Float32 scalar.
    """
    dtype = _compute_dtype(features)
    # The products inside take the dtype of their operands, so that teacher logits keep theirs.
    with torch.autocast(features.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(
            features.to(dtype), prototypes.to(dtype), targets, pairs, weights, temp, chunk_size
        )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, prototypes, targets, pairs, weights, temp, chunk_size):
        num_student, num_rows, _ = features.shape
        flat = features.flatten(0, 1)  # (S R, b)
        running = _RunningLogSum(len(flat), flat.device)
        mass = torch.zeros(num_student, num_rows, device=flat.device)
        matched = torch.zeros(num_student, num_rows, device=flat.device)
        for part in _slices(len(prototypes), chunk_size):
            logits = _scaled_logits(flat, prototypes[part], temp)
            wanted = _paired(targets.chunk(part), pairs)  # (S, R, c)
            matched += torch.linalg.vecdot(logits.view_as(wanted), wanted)
            mass += wanted.sum(-1)
            running.add(logits)
        log_norm = running.value()
        ctx.save_for_backward(features, prototypes, pairs, weights, log_norm, mass)
        ctx.targets, ctx.temp, ctx.chunk_size = targets, temp, chunk_size
        return (weights * (mass * log_norm.view_as(mass) - matched)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        features, prototypes, pairs, weights, log_norm, mass = ctx.saved_tensors
        flat = features.flatten(0, 1)
        row_factor = (weights * (grad_output / ctx.temp)).expand_as(mass).reshape(-1, 1)
        grad_features = torch.zeros_like(flat, dtype=torch.float32)
        grad_prototypes = torch.empty_like(prototypes)
        for part in _slices(len(prototypes), ctx.chunk_size):
            piece = _scaled_logits(flat, prototypes[part], ctx.temp)
            piece.sub_(log_norm[:, None]).exp_().mul_(mass.view(-1, 1))
            piece -= _paired(ctx.targets.chunk(part), pairs).flatten(0, 1)
            grad_logits = piece.mul_(row_factor).to(flat.dtype)
            grad_features += grad_logits @ prototypes[part]
            torch.matmul(grad_logits.t(), flat, out=grad_prototypes[part])
        grad_features = grad_features.to(features.dtype).view_as(features)
        return grad_features, grad_prototypes, None, None, None, None, None


class _RunningLogSum:
    """``log sum exp`` of rows whose columns arrive in chunks."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.peak = torch.full((num_rows,), -torch.inf, device=device)
        self.total = torch.zeros(num_rows, device=device)

    def add(self, values: Tensor) -> None:
        """Take (rows, c) float32 values, which are overwritten."""
        peak = torch.maximum(self.peak, values.amax(1))
        self.total *= torch.exp(self.peak - peak)
        self.total += values.sub_(peak[:, None]).exp_().sum(1)
        self.peak = peak

    def value(self) -> Tensor:
        """The result (rows,)."""
        return self.peak + self.total.log()


def _scaled_logits(features: Tensor, prototypes: Tensor, temp: float | Tensor) -> Tensor:
    """Float32 logits over temperature, from a product in the dtype of the features."""
    product = features @ prototypes.to(features.dtype).t()
    return product.float().div_(temp)


def _paired(probabilities: Tensor, pairs: Tensor) -> Tensor:
    """(T R, c) teacher probabilities to the sum (S, R, c) over the crops paired with each s."""
    num_student, num_teacher = pairs.shape
    crops = probabilities.view(num_teacher, -1)
    return (pairs @ crops).view(num_student, -1, probabilities.shape[1])


def _log_sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``log sum exp`` over the ranks of a vector that each rank holds."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return values
    peak = values.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    total = torch.exp(values - peak)
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
    return peak + total.log()


def _compute_dtype(features: Tensor) -> torch.dtype:
    kind = features.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
