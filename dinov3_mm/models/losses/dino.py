"""DINO loss on CLS tokens (arXiv 2508.10104 section 3.2)."""

import torch
from torch import Tensor

from .soft_cross_entropy import soft_cross_entropy


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
