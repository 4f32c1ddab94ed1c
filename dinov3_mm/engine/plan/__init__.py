"""Memory, operations and traffic of a training step, predicted from shapes alone."""

from .backbones import UnknownStepError
from .options import Option, option_of
from .run import OptionPlan, Plan, make_plan, own_peaks, print_plan

__all__ = [
    "Option",
    "OptionPlan",
    "Plan",
    "UnknownStepError",
    "make_plan",
    "option_of",
    "own_peaks",
    "print_plan",
]
