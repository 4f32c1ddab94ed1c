"""Hooks: the life cycle of the model's parts, schedules, checkpoints, progress, evaluation."""

from .checkpoint import PretrainCheckpointHook
from .class_check import ClassCheckHook
from .diagnosis import DiagnosisHook
from .distillation import DistillationHook
from .evaluation import DenseProbeHook, KNNEvalHook, RetrievalEvalHook
from .export import ExportTeacherHook
from .folder_evaluation import FolderEvalHook, SummaryHook
from .frozen_backbone import FrozenBackboneHook
from .gram_anchor import GramAnchorHook
from .guards import CollapseGuardHook, NonFiniteGuardHook
from .host_checkpoint import HostCheckpointHook
from .label_check import DepthCheckHook, LabelCheckHook
from .logging import ProgressHook
from .per_student import PerStudentHook
from .resume import ResumeHook
from .schedule import OptimScheduleHook
from .schedule_check import ScheduleCheckHook
from .teacher_ema import TeacherEMAHook

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
