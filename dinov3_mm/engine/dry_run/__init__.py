"""A training step of any config on any number of ranks, in one CPU process without data."""

from .report import print_report
from .run import DryRunReport, dry_run
from .step import StepRecord, UnpredictableStepError

__all__ = ["DryRunReport", "StepRecord", "UnpredictableStepError", "dry_run", "print_report"]
