"""Runs that train several students: one runner, strategy and log, hooks for each student."""

from .strategy import MultiDistillationStrategy
from .view import StudentRunner, student_runners

__all__ = ["MultiDistillationStrategy", "StudentRunner", "student_runners"]
