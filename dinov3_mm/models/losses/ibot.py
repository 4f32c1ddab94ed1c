"""iBOT masked-patch loss (arXiv 2508.10104 section 3.2; arXiv 2111.07832)."""

from torch import Tensor

from .soft_cross_entropy import soft_cross_entropy


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
