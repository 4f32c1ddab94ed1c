"""Launching, run files and the checkpoint format."""

from dinov3_mm.engine.runner.branches import resume_point
from dinov3_mm.engine.runner.files import find_latest_checkpoint
from dinov3_mm.engine.runner.launch import LAUNCHERS, end_processes, start_processes
from dinov3_mm.engine.runner.stopping import run_training
from dinov3_mm.engine.runner.training_state import read_training_state, write_training_state

__all__ = [
    "LAUNCHERS",
    "end_processes",
    "find_latest_checkpoint",
    "read_training_state",
    "resume_point",
    "run_training",
    "start_processes",
    "write_training_state",
]
