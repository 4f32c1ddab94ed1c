"""The quick part of ``branching.py``: two ranks, a folder of shards, real kills."""

import pytest

from tests.acceptance.branching import branch
from tests.integration.toy_run import write_images


@pytest.mark.slow
def test_two_ranks_with_shards_end_on_the_new_branch(tmp_path):
    assert branch(tmp_path, write_images(tmp_path / "images"), "shards", iters=8)
