"""Two gloo ranks train the same model as one process (``tests/acceptance/rank_parity.py``)."""

import pytest

from tests.acceptance.rank_parity import compare, train_alone, train_ranks
from tests.integration.toy_run import write_images

ITERS = 20


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    images = write_images(tmp_path / "images")
    alone = train_alone(tmp_path, images, ITERS)
    difference = compare(alone, train_ranks(tmp_path, images, ITERS, 2), ITERS)
    assert difference.is_within_bars, str(difference)
