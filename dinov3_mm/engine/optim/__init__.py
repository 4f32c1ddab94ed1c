"""Schedules, parameter groups and the optimizer wrapper of DINOv3 pretraining."""

from .constructor import PretrainOptimConstructor
from .head_schedules import MultiStepShareLR, WarmupOneCycleLR, WarmupOneCycleMomentum
from .layer_decay import LayerDecayOptimConstructor
from .param_groups import BACKBONE, ParamMultipliers, build_param_groups, param_multipliers
from .schedule_config import build_schedule, lr_scale, scale_lr_schedule
from .schedules import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    Schedule,
    WarmupCosineSchedule,
)
from .wrapper import PretrainOptimWrapper

__all__ = [
    "BACKBONE",
    "ConstantSchedule",
    "CosineSchedule",
    "LayerDecayOptimConstructor",
    "LinearSchedule",
    "MultiStepShareLR",
    "ParamMultipliers",
    "PretrainOptimConstructor",
    "PretrainOptimWrapper",
    "Schedule",
    "WarmupCosineSchedule",
    "WarmupOneCycleLR",
    "WarmupOneCycleMomentum",
    "build_param_groups",
    "build_schedule",
    "lr_scale",
    "param_multipliers",
    "scale_lr_schedule",
]
