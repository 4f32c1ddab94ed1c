"""Hyper-parameters that follow from the data set, the batch and the backbone."""

from .resolve import RECORD, DataFacts, resolve_auto

__all__ = ["RECORD", "DataFacts", "resolve_auto"]
