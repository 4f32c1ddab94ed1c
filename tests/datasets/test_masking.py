"""Block masks against statistics and counts measured on the reference."""

import numpy as np
import pytest
from scipy import ndimage

from dinov3_mm.datasets.collate import (
    MaskPlanner,
    block_mask,
    mask_counts,
    max_block_patches,
    place_blocks,
)
from tests.golden import load_golden

GOLDEN, _ = load_golden("ssl_masking_data")
STATISTICS = GOLDEN["mask_stats_2000_draws"]
DRAWS = 1000


@pytest.mark.parametrize(("sizes", "expected"), GOLDEN["max_num_patches"].items())
def test_largest_block(sizes, expected):
    image_size, patch_size = map(int, sizes.split("/"))
    assert max_block_patches(image_size, patch_size) == expected


@pytest.mark.parametrize("name", [name for name in STATISTICS if name[-1] in "135"])
def test_mask_statistics(name):
    """Bounds are about four standard errors of the difference of two sample means."""
    expected = STATISTICS[name]
    side = int(name[len("grid") :].split("_")[0])
    target, largest = expected["target"], max_block_patches(side * 16, 16)
    rng = np.random.default_rng(0)
    masks = np.stack([block_mask(target, (side, side), largest, rng) for _ in range(DRAWS)])
    assert (masks.sum(axis=(1, 2)) == target).all()

    grids = np.zeros((DRAWS, side, side), bool)
    blocks = np.array([place_blocks(grid, target, largest, rng) for grid in grids])
    assert abs(blocks.mean() - expected["mean_patches_from_blocks"]) < 0.05
    full = (blocks == target).mean()
    assert abs(full - expected["frac_draws_fully_block_filled"]) < 0.04

    components = np.mean([ndimage.label(mask)[1] for mask in masks[:400]])
    assert abs(components - expected["mean_4connected_components_400draws"]) < 0.35

    frequency, middle = masks.mean(axis=0), side // 2
    border = np.concatenate([frequency[0], frequency[-1], frequency[1:-1, 0], frequency[1:-1, -1]])
    centre = frequency[middle - 1 : middle + 1, middle - 1 : middle + 1]
    assert abs(border.mean() - expected["mask_frequency_border"]) < 0.012
    assert abs(centre.mean() - expected["mask_frequency_centre2x2"]) < 0.045


@pytest.mark.parametrize("case", GOLDEN["collate"], ids=lambda case: f"{case['img']}px")
def test_mask_counts(case):
    images = case["local_batch_size"] or case["loader_batch"]
    counts = mask_counts(2 * images, case["n_tokens"], case["mask_probability"], case["ratio"])
    assert sorted(counts[counts > 0].tolist()) == case["sorted_counts"]
    assert counts.sum() == case["upperbound"]


@pytest.mark.parametrize("target", [0, 1, 3, 37, 195, 196])
def test_any_count_is_met_exactly(target):
    for seed in range(20):
        mask = block_mask(target, (14, 14), 98.0, np.random.default_rng(seed))
        assert mask.sum() == target


def test_no_block_spans_the_grid():
    """A 2 x 2 block is all that four patches allow on a 2 x 2 grid, and it must be smaller."""
    rng = np.random.default_rng(0)
    assert all(place_blocks(np.zeros((2, 2), bool), 4, 4.0, rng) == 0 for _ in range(50))


def test_random_shift_removes_the_centre_bias():
    rng = np.random.default_rng(0)
    masks = [block_mask(64, (16, 16), 128.0, rng, random_shift=True) for _ in range(DRAWS)]
    frequency = np.mean(masks, axis=0)
    assert np.mean([mask.sum() for mask in masks]) == 64
    assert abs(frequency - 0.25).max() < 0.08


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_global_plan_does_not_depend_on_the_number_of_ranks(ranks):
    planner, total = MaskPlanner(64, 16), 12
    whole = planner(0, 5, 0, total, total).reshape(2, total, 16)
    share = total // ranks
    parts = [
        planner(0, 5, rank * share, share, total).reshape(2, share, 16) for rank in range(ranks)
    ]
    assert (np.concatenate(parts, axis=1) == whole).all()
    assert (planner(0, 6, 0, total, total) != whole.reshape(-1, 16)).any()


@pytest.mark.parametrize("case", GOLDEN["collate"][1:5], ids=lambda case: f"{case['img']}px")
def test_rank_plan_gives_every_rank_the_reference_count(case):
    planner = MaskPlanner(case["img"], 16, scope="rank")
    count = case["loader_batch"]
    plans = [planner(0, 0, rank * count, count, 2 * count) for rank in range(2)]
    assert [plan.sum() for plan in plans] == [case["upperbound"]] * 2
    assert (plans[0] != plans[1]).any()
    assert (plans[0].any(axis=1).sum()) == case["n_masked_images"]


def test_plan_is_shuffled_over_crops():
    """Each of the 16 rows is masked half of the time, whatever its place in the batch."""
    planner = MaskPlanner(64, 16)
    masked = np.mean([planner(0, it, 0, 8, 8).any(axis=1) for it in range(400)], axis=0)
    assert abs(masked - 0.5).max() < 0.11


def test_bad_arguments():
    with pytest.raises(ValueError, match="60 px cannot be cut into patches of 16 px; use 48 px"):
        MaskPlanner(60, 16)
    with pytest.raises(ValueError, match=r"ratio must be .* got \(0\.5, 0\.1\)"):
        MaskPlanner(64, 16, ratio=(0.5, 0.1))
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got 2"):
        MaskPlanner(64, 16, probability=2)
    with pytest.raises(ValueError, match="'global' or 'rank', got 'node'"):
        MaskPlanner(64, 16, scope="node")
