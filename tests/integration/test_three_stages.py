"""The three stages of the quickstart on two ranks, a few steps each.

``tests/acceptance/three_stages.py`` is the long version.
"""

import pytest

from dinov3_mm.engine.run_files import list_checkpoints
from tests.acceptance.three_stages import STAGES, three_stages

SHORT = ["train_cfg.max_iters=3", "train_cfg.global_batch_size=8"]
SMALL = ["train_dataloader.source.length=32", "train_dataloader.source.cache=False"]
PROBE = [
    "custom_hooks.6.at_start=False",
    "custom_hooks.6.train_source.length=30",
    "custom_hooks.6.test_source.length=20",
]
OPTIONS = {
    "pretrain": [
        *SHORT,
        *SMALL,
        "custom_hooks.0.lr.warmup_iters=1",
        "custom_hooks.5.at_start=False",
        "custom_hooks.5.train_source.length=30",
        "custom_hooks.5.test_source.length=20",
    ],
    "gram": [*SHORT, *SMALL, *PROBE, "custom_hooks.0.lr.warmup_iters=1"],
    "high_res": [*SHORT, *SMALL, *PROBE],
}


@pytest.mark.slow
def test_each_stage_starts_from_the_one_before(tmp_path):
    scores = three_stages(tmp_path, OPTIONS, counts=(60, 30))
    assert list(scores) == list(STAGES)
    for stage in STAGES:
        assert list(list_checkpoints(tmp_path / stage)) == [3]
