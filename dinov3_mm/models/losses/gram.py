"""Gram anchoring: patch similarities of the student follow a teacher (arXiv 2508.10104 sec. 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalized: bool = True,
    img_level: bool = True,
    remove_neg: bool = False,
    remove_only_teacher_neg: bool = False,
) -> Tensor:
    """Mean squared difference of the patch Gram matrices, in float32.

    Args:
        student: (n, P, D) student patch features, or (P, D) with ``img_level=False``.
        teacher: same shape; no gradient flows here.
        normalized: L2-normalise each patch feature, so that similarities are cosines.
        img_level: one P x P matrix per image; else one matrix over all patches of the batch.
        remove_neg: set negative similarities of both to 0.
        remove_only_teacher_neg: set negative similarities of the teacher to 0. The student's stay,
            as in the released training code.

    Returns:
        Float32 scalar: the mean over all matrix entries.

    Raises:
        ValueError: shapes that differ or do not fit ``img_level``; both removal flags at once.
    """
    if remove_neg and remove_only_teacher_neg:
        raise ValueError("gram_loss: give either remove_neg or remove_only_teacher_neg, not both")
    if student.shape != teacher.shape or student.ndim not in ((3,) if img_level else (2, 3)):
        raise ValueError(
            f"gram_loss with img_level={img_level} expects student and teacher of equal shape "
            f"{'(n, P, D)' if img_level else '(n, P, D) or (P, D)'}, got {tuple(student.shape)} "
            f"and {tuple(teacher.shape)}"
        )
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = student.float(), teacher.detach().float()
        if normalized:
            student = F.normalize(student, dim=-1, eps=EPS)
            teacher = F.normalize(teacher, dim=-1, eps=EPS)
        if not img_level:
            student, teacher = student.flatten(0, -2)[None], teacher.flatten(0, -2)[None]
        target = teacher @ teacher.transpose(1, 2)  # (n, P, P)
        if remove_neg or remove_only_teacher_neg:
            target.relu_()
        if remove_neg:
            return F.mse_loss((student @ student.transpose(1, 2)).relu(), target)
        difference = torch.baddbmm(target, student, student.transpose(1, 2), beta=-1)
        return difference.square().mean()


def resize_tokens(
    tokens: Tensor,
    source_grid: tuple[int, int],
    target_grid: tuple[int, int],
    *,
    method: str = "bicubic",
    antialias: bool = False,
) -> Tensor:
    """Resample a grid of patch tokens.

    Args:
        tokens: (n, H*W, D) row-major tokens.
        source_grid: (H, W) of ``tokens``.
        target_grid: (H', W') wanted.
        method: ``'bicubic'`` or ``'bilinear'``; corners are not aligned.
        antialias: low-pass filter when the grid shrinks.

    Returns:
        (n, H'*W', D), dtype of ``tokens``; ``tokens`` itself when the grids are equal.

    Raises:
        ValueError: ``tokens`` does not hold H*W tokens.
    """
    if tokens.ndim != 3 or tokens.shape[1] != source_grid[0] * source_grid[1]:
        raise ValueError(
            f"resize_tokens: tokens of shape {tuple(tokens.shape)} are not (n, H*W, D) for the "
            f"grid {source_grid}"
        )
    if source_grid == target_grid:
        return tokens
    grid = tokens.transpose(1, 2).unflatten(2, source_grid)  # (n, D, H, W)
    grid = F.interpolate(
        grid, size=target_grid, mode=method, align_corners=False, antialias=antialias
    )
    return grid.flatten(2).transpose(1, 2)
