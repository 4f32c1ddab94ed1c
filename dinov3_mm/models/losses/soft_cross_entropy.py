"""Cross-entropy between prototype logits and soft targets, fused so that its memory stays small.

With up to 262,144 prototypes the logits are the largest tensors of a training step. Autograd's own
chain (cast, divide, log-softmax, multiply, sum) keeps several float32 copies of them; this function
keeps only the logits in the dtype in which the head produced them plus one number per row.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fusion import fused

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
