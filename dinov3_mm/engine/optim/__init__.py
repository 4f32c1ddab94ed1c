"""Schedules, parameter groups and the optimizer wrapper of DINOv3 pretraining."""

from .schedule_config import build_schedule, lr_scale, scale_lr_schedule
from .schedules import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    Schedule,
    WarmupCosineSchedule,
)

__all__ = [
    "ConstantSchedule",
    "CosineSchedule",
    "LinearSchedule",
    "Schedule",
    "WarmupCosineSchedule",
    "build_schedule",
    "lr_scale",
    "scale_lr_schedule",
]
