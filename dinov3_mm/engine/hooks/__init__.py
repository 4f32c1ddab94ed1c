"""Hooks: the life cycle of the model's parts, schedules, checkpoints, progress, evaluation."""

from .checkpoint import ExportTeacherHook, PretrainCheckpointHook
from .class_check import ClassCheckHook
from .data_checks import DepthCheckHook, LabelCheckHook, ScheduleCheckHook
from .downstream_checkpoint import FrozenBackboneHook, HostCheckpointHook
from .evaluation import DenseProbeHook, FolderEvalHook, KNNEvalHook, RetrievalEvalHook, SummaryHook
from .guards import CollapseGuardHook, DiagnosisHook, NonFiniteGuardHook
from .per_student import PerStudentHook
from .progress import ProgressHook
from .resume import ResumeHook
from .schedule import OptimScheduleHook, TeacherEMAHook
from .teachers import DistillationHook, GramAnchorHook

__all__ = [
    "ClassCheckHook",
    "CollapseGuardHook",
    "DenseProbeHook",
    "DepthCheckHook",
    "DiagnosisHook",
    "DistillationHook",
    "ExportTeacherHook",
    "FolderEvalHook",
    "FrozenBackboneHook",
    "GramAnchorHook",
    "HostCheckpointHook",
    "KNNEvalHook",
    "LabelCheckHook",
    "NonFiniteGuardHook",
    "OptimScheduleHook",
    "PerStudentHook",
    "PretrainCheckpointHook",
    "ProgressHook",
    "ResumeHook",
    "RetrievalEvalHook",
    "ScheduleCheckHook",
    "SummaryHook",
    "TeacherEMAHook",
]
