"""The cut of the global sample counter into iterations, micro batches and ranks."""

from itertools import chain

import pytest

from dinov3_mm.datasets.order import PositionBatchSampler


def positions(rank=0, world=1, accumulate=1, start=0, size=24, iters=3):
    sampler = PositionBatchSampler(
        size, rank, world, accumulate=accumulate, start_iter=start, max_iters=iters
    )
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


def test_layout_by_hand():
    assert positions(rank=1, world=2, accumulate=2, size=8, iters=2) == [
        [2, 3],
        [6, 7],
        [10, 11],
        [14, 15],
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_cover_every_position_once_and_in_the_order_of_one_process(world, accumulate):
    ranks = [positions(rank, world, accumulate) for rank in range(world)]
    joined = [list(chain(*batches)) for batches in zip(*ranks)]
    assert joined == positions(accumulate=accumulate)
    assert list(chain(*joined)) == list(range(72))


def test_start_iter_continues():
    assert positions(1, 2, 3, start=2) == positions(1, 2, 3)[6:]


def test_uneven_batch_is_an_error_with_a_way_out():
    with pytest.raises(ValueError, match=r"global_batch_size=10 .* 3 \* 2 = 6; use e\.g\. 12"):
        PositionBatchSampler(10, 0, 3, accumulate=2, max_iters=1)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        PositionBatchSampler(4, 2, 2, max_iters=1)
    with pytest.raises(ValueError, match="start_iter <= max_iters"):
        PositionBatchSampler(4, start_iter=5, max_iters=4)
