"""Schedules, parameter groups and the optimizer wrapper of DINOv3 pretraining."""

from .head_schedules import MultiStepShareLR, WarmupOneCycleLR, WarmupOneCycleMomentum
from .layer_decay import LayerDecayOptimConstructor
from .optimizer import (
    BACKBONE,
    ParamMultipliers,
    PretrainOptimConstructor,
    PretrainOptimWrapper,
    build_param_groups,
    param_multipliers,
)
from .schedules import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    Schedule,
    WarmupCosineSchedule,
    build_schedule,
    lr_scale,
    scale_lr_schedule,
)

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
