"""When sharded gradients of several micro batches are reduced."""

from torch import nn

from .sharding import sharded_modules


class GradientReduction:
    """Tells the units of a sharded model whether the coming backward pass reduces gradients.

    By default only that of the last micro batch of a step does: the others add up the whole
    gradients of every unit, in the dtype of the reduction, on every rank. With
    ``every_micro_batch`` each backward pass reduces and only shards are kept; replicas (HSDP) are
    still averaged once a step.

    Args:
        model: the sharded algorithm.
        every_micro_batch: less memory for more traffic.
    """

    def __init__(self, model: nn.Module, *, every_micro_batch: bool = False) -> None:
        self._units = sharded_modules(model)
        self.every_micro_batch = every_micro_batch

    def __call__(self, is_last: bool) -> None:
        """Prepare a micro batch.

        Args:
            is_last: whether the optimizer steps after it.
        """
        for unit in self._units:
            unit.set_requires_gradient_sync(is_last or self.every_micro_batch, recurse=False)
            unit.set_requires_all_reduce(is_last, recurse=False)
