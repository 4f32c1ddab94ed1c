"""Memory, operations and traffic of a training step, predicted from shapes alone."""

from .options import Option, option_of
from .report import print_plan
from .run import OptionPlan, Plan, make_plan

__all__ = ["Option", "OptionPlan", "Plan", "make_plan", "option_of", "print_plan"]
