"""A run that goes back to an older checkpoint, dies and is queued again, in one process.

``tests/acceptance/branching.py`` is the longer version, with real kills, two ranks and shards.
"""

import pytest
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from dinov3_mm.engine.run_files import checkpoint_path, list_checkpoints
from tests.integration.toy_run import toy_config, train, write_images
from tests.integration.traces import different_tensors, read_trace


class Killed(Exception):
    """What ends the run at once."""


@HOOKS.register_module(force=True)
class DieHook(Hook):
    """Ends the run in the middle of an iteration."""

    def __init__(self, iteration: int | None = None):
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.iteration:
            raise Killed


@pytest.fixture
def run(tmp_path):
    images = write_images(tmp_path / "images", count=12)

    def start(work_dir, *arguments, rate=2e-3, dies_at=None, max_iters=12):
        cfg = toy_config(images, tmp_path / work_dir, train_cfg__max_iters=max_iters)
        cfg.custom_hooks[0].lr.base = rate
        cfg.custom_hooks.append(dict(type="DieHook", iteration=dies_at))
        cfg.default_hooks.checkpoint.max_to_keep = None
        train(cfg, tmp_path, *arguments)

    return start


@pytest.mark.parametrize("dies_at", [6, 10], ids=["before its first save", "after it"])
def test_ends_on_the_new_branch(run, tmp_path, dies_at):
    old, new = tmp_path / "old", tmp_path / "new"
    run("old")
    back = str(checkpoint_path(old, 6))
    with pytest.raises(Killed):
        run("old", "--resume", back, rate=1e-3, dies_at=dies_at)
    assert max(list_checkpoints(old)) == (6 if dies_at == 6 else 9)
    run("old", "--resume", rate=1e-3)
    run("new", max_iters=6)
    run("new", "--resume", rate=1e-3)
    assert read_trace(old) == read_trace(new)
    assert different_tensors(old, new, 12) == []
    aside = old / "abandoned" / "001_after_iter_00000006"
    assert list(list_checkpoints(aside)) == [9, 12]
