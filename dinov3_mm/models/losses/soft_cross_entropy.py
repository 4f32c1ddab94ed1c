"""Cross-entropy between prototype logits and soft targets, fused so that its memory stays small.

With up to 262,144 prototypes the logits are the largest tensors of a training step. Autograd's own
chain (cast, divide, log-softmax, multiply, sum) keeps several float32 copies of them; this function
keeps only the logits in the dtype in which the head produced them plus one number per row.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
            scaled = logits[:, part].to(torch.float32, copy=True).mul_(scale)
            target = targets[:, part]
            matched[:, part] = torch.linalg.vecdot(scaled, target.expand_as(scaled))
            peak = scaled.amax(-1, keepdim=True)
            total = scaled.sub_(peak).exp_().sum(-1)
            log_norm[:, part] = peak.squeeze(-1) + total.log_()
            mass[:, part] = target.sum(-1)
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
            piece = logits[:, part].to(torch.float32, copy=True).mul_(ctx.scale)
            piece.sub_(log_norm[:, part]).exp_().mul_(mass[:, part]).sub_(targets[:, part])
            torch.mul(piece, row_factor[:, part], out=piece)
            grad[:, part] = piece
        return grad, None, None, None


def _row_slices(logits: Tensor) -> list[slice]:
    """Split the second axis so that one piece holds about a chunk of elements."""
    entries, rows, classes = logits.shape
    chunk = CPU_CHUNK if logits.device.type == "cpu" else DEVICE_CHUNK
    step = max(1, chunk // max(1, entries * classes))
    return [slice(start, start + step) for start in range(0, rows, step)]
