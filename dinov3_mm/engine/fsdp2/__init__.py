"""Fully sharded training: what is sharded, how it starts, and the strategy that does both."""

from .strategy import FSDP2Strategy

__all__ = ["FSDP2Strategy"]
