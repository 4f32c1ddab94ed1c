"""Self-supervised pretraining: the DINOv3 algorithm, heads, Gram teacher and diagnostics."""

from .dinov3 import DINOv3
from .distillation import DistillationTeacher
from .gram_teacher import GramTeacher
from .multi_distillation import MultiDistillation
from .preprocessor import MultiCropPreprocessor
from .several_teachers import DistillationTeachers, TeacherHeads
from .student import DINOv3Head

__all__ = [
    "DINOv3",
    "DINOv3Head",
    "DistillationTeacher",
    "DistillationTeachers",
    "GramTeacher",
    "MultiCropPreprocessor",
    "MultiDistillation",
    "TeacherHeads",
]
