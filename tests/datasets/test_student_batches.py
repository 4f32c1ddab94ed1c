"""Batches for several students: uneven ranks, masks of a part of the batch, several patch sizes."""

import numpy as np
import pytest
import torch

from dinov3_mm.datasets.collate import MultiCropCollate
from dinov3_mm.datasets.order import BatchLayout, PositionBatchSampler


def samples(positions):
    crops = [np.zeros((3, 64, 64), np.uint8)] * 2
    local = [np.zeros((3, 32, 32), np.uint8)] * 2
    return [
        {"position": p, "global_crops": crops, "local_crops": local, "broken": []}
        for p in positions
    ]


def test_the_released_layout_reads_a_little_more_than_a_batch():
    layout = BatchLayout(1920, 296, surplus=True)
    assert layout.rank_batch_size == 7
    read = [p for rank in range(296) for p in layout.positions(3, 0, rank)]
    assert len(read) == 2072
    # In rank order the batch comes first, whole; what follows is dropped after the exchange.
    assert read[:1920] == list(range(3 * 1920, 4 * 1920))
    assert set(read[1920:]) <= set(read[:1920])
    with pytest.raises(ValueError, match=r"not divisible by world_size.*296 \* 1 = 296"):
        BatchLayout(1920, 296)


def test_ranks_with_surplus_read_consecutive_places():
    lists = [list(PositionBatchSampler(6, r, 4, surplus=True, max_iters=2)) for r in range(4)]
    assert [batches[1] for batches in lists] == [[6, 7], [8, 9], [10, 11], [6, 7]]
    collate = MultiCropCollate(64, 16, global_batch_size=5)
    collate.mask_share = (0, 1)
    assert collate(samples([9, 5]))["positions"].tolist() == [9, 5]
    with pytest.raises(ValueError, match="consecutive positions of one micro batch"):
        collate(samples([9, 10]))


@pytest.mark.parametrize("scope", ["global", "rank"])
def test_masks_of_a_part_are_those_of_a_rank_that_reads_it(scope):
    def build():
        return MultiCropCollate(64, 16, global_batch_size=8, mask_scope=scope)

    expected = build()(samples(range(12, 16)))
    collate = build()
    collate.mask_share = (1, 2)
    actual = collate(samples([10, 11]))
    assert actual["global_crops"].shape[0] == 4
    for key in ("masks", "mask_indices", "masks_weight"):
        assert torch.equal(actual[key], expected[key])


def test_each_patch_size_has_the_masks_that_it_has_alone():
    both = MultiCropCollate(64, [8, 32], global_batch_size=4)(samples(range(4)))
    for patch in (8, 32):
        alone = MultiCropCollate(64, patch, global_batch_size=4)(samples(range(4)))
        assert "masks_of" not in alone
        for key in ("masks", "mask_indices", "masks_weight", "num_masked"):
            assert torch.equal(both["masks_of"][str(patch)][key], alone[key])
    assert torch.equal(both["masks"], both["masks_of"]["8"]["masks"])
