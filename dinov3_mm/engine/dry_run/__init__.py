"""A training step of any config on any number of ranks, in one CPU process without data."""

from .config import check_file
from .run import DryRunReport, dry_run, dry_runs, print_report
from .step import StepRecord, UnpredictableStepError

__all__ = [
    "DryRunReport",
    "StepRecord",
    "UnpredictableStepError",
    "check_file",
    "dry_run",
    "dry_runs",
    "print_report",
]
