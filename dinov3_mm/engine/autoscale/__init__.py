"""Hyper-parameters that follow from the data set, the batch and the backbone."""

from .facts import DataFacts
from .resolve import RECORD, resolve_auto

__all__ = ["RECORD", "DataFacts", "resolve_auto"]
