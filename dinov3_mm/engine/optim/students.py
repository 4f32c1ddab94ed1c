"""One optimizer for each of several students."""

from mmengine.optim import OptimWrapperDict
from torch import nn


class StudentOptimWrappers(OptimWrapperDict):
    """Optimizer wrappers by student; each steps, clips and skips on its own."""

    def initialize_count_status(self, model: nn.Module, cur_iter: int, max_iters: int) -> None:
        """Tell every wrapper where the run stands."""
        for wrapper in self.optim_wrappers.values():
            wrapper.initialize_count_status(model, cur_iter, max_iters)
