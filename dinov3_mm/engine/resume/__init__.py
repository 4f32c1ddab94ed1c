"""``--resume``: which checkpoint a run goes on from, and what is different from then on."""

from .checkpoint import (
    checkpoint_of,
    choose_checkpoint,
    progress,
    read_resumed,
    refuse_resumed,
    saved_checkpoints,
    set_resume,
    unit_of,
)
from .comparison import (
    RUN,
    Difference,
    compare_configs,
    compare_schedules,
    identify_samples,
    is_length,
    record_run,
)

__all__ = [
    "RUN",
    "Difference",
    "checkpoint_of",
    "choose_checkpoint",
    "compare_configs",
    "compare_schedules",
    "identify_samples",
    "is_length",
    "progress",
    "read_resumed",
    "record_run",
    "refuse_resumed",
    "saved_checkpoints",
    "set_resume",
    "unit_of",
]
