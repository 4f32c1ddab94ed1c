"""A hook that ends a run early, as a scheduler's signal does."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class StopHook(Hook):
    """Ends the run after ``after`` iterations."""

    priority = "LOWEST"

    def __init__(self, after: int):
        self.after = after

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.after:
            runner.train_loop.stop_training = True
