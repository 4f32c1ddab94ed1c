"""Mixtures: exact shares, every image once per epoch of its part, no state."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dinov3_mm.datasets import build_pretrain_dataloader
from dinov3_mm.datasets.order import CYCLE, EpochOrder, Interleaving
from dinov3_mm.datasets.sources.mixture import BatchMixture, WeightedConcat


class Numbers:
    """A source of ``count`` one-pixel images that show their index."""

    def __init__(self, count: int, name: str) -> None:
        self.count, self.name = count, name

    def __len__(self) -> int:
        return self.count

    def load_image(self, index: int) -> np.ndarray:
        return np.full((1, 1, 3), index, np.uint8)

    def path(self, index: int) -> str:
        return f"{self.name}/{index}"


def test_epochs_show_every_image_once():
    order = EpochOrder(7, seed=3)
    epochs = [[order(7 * epoch + k) for k in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("ratios", [[0.1, 0.9], [1, 1, 1], [5.0, 0.001]])
def test_shares_are_exact_in_every_cycle(ratios):
    interleaving = Interleaving(ratios, seed=0)
    for cycle in range(2):
        owners = Counter(interleaving(cycle * CYCLE + k)[0] for k in range(CYCLE))
        for part, ratio in enumerate(ratios):
            assert abs(owners[part] - CYCLE * ratio / sum(ratios)) < 1


def test_ordinals_count_the_slots_of_a_part():
    interleaving = Interleaving([0.3, 0.7], seed=1)
    seen = [interleaving(k) for k in range(2 * CYCLE)]
    for part in range(2):
        assert sorted(ordinal for owner, ordinal in seen if owner == part) == list(
            range(2 * interleaving.shares[part])
        )


def test_samples_of_a_weighted_concat():
    mixture = WeightedConcat([Numbers(30, "a"), Numbers(500, "b")], [0.25, 0.75])
    order = mixture.order(seed=5, global_batch_size=8)
    indices = [order(position) for position in range(CYCLE)]
    from_a = [index for index in indices if index < 30]
    assert len(from_a) == CYCLE // 4
    # 2500 draws of 30 images: 83 whole epochs and ten more.
    assert set(Counter(from_a).values()) == {83, 84}
    assert mixture.path(29) == "a/29"
    assert mixture.path(30) == "b/0"
    assert mixture.load_image(31)[0, 0, 0] == 1


def test_batches_of_a_batch_mixture_have_one_source():
    parts = [Numbers(30, "a"), WeightedConcat([Numbers(40, "b"), Numbers(50, "c")], [1, 1])]
    order = BatchMixture(parts, [0.1, 0.9]).order(seed=5, global_batch_size=6)
    homogeneous = 0
    for iteration in range(CYCLE // 10):
        batch = [order(iteration * 6 + k) for k in range(6)]
        assert len({index < 30 for index in batch}) == 1
        homogeneous += batch[0] < 30
    assert 60 < homogeneous < 140  # a tenth of 1000


def test_no_image_of_a_part_is_lost_or_repeated():
    mixture = BatchMixture([Numbers(12, "a"), Numbers(12, "b")], [0.5, 0.5])
    order = mixture.order(seed=2, global_batch_size=4)
    seen = Counter(order(position) for position in range(4 * CYCLE))
    # Each part gets 5000 batches of 4 images: 1666 epochs and eight images.
    assert set(seen.values()) == {1666, 1667}


def test_order_depends_on_the_seed_only():
    first, again, other = (
        WeightedConcat([Numbers(9, "a"), Numbers(11, "b")], [1, 2]).order(seed, 4)
        for seed in (0, 0, 1)
    )
    positions = [10**9 + k for k in range(50)]
    assert [first(p) for p in positions] == [again(p) for p in reversed(positions)][::-1]
    assert [first(p) for p in positions] != [other(p) for p in positions]


@pytest.mark.parametrize("ratios", [[], [1.0], [1.0, 0.0], [1.0, -1.0], [1.0, 1e-9]])
def test_bad_ratios(ratios):
    with pytest.raises(ValueError, match="ratio"):
        WeightedConcat([Numbers(3, "a"), Numbers(4, "b")], ratios)


def test_the_loader_trains_on_a_mixture(tmp_path):
    for name, count in (("a", 4), ("b", 8)):
        (tmp_path / name).mkdir()
        for index in range(count):
            pixels = np.full((40, 40, 3), index + 100 * (name == "b"), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    parts = [dict(type="ImageFolder", root=str(tmp_path / name)) for name in "ab"]
    loader = build_pretrain_dataloader(
        dict(
            source=dict(type="BatchMixture", parts=parts, ratios=[0.5, 0.5]),
            transform=dict(
                global_size=32,
                local_size=16,
                num_local=1,
                jitter_prob=0,
                solarize_prob=0,
                grayscale_prob=0,
            ),
            num_workers=0,
        ),
        global_batch_size=2,
        max_iters=20,
    )
    darkest = [batch["global_crops"].float().amax(dim=(1, 2, 3)) < 50 for batch in loader]
    assert {bool(batch.all()) for batch in darkest} == {True, False}
    assert all(batch.all() or not batch.any() for batch in darkest)
