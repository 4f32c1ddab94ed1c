"""Counter-based randomness: pure functions of their arguments, and good permutations."""

import subprocess
import sys
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from dinov3_mm.datasets.order import Permutation, sample_generator, torch_seed


def test_generator_depends_on_every_argument_and_on_nothing_else():
    arguments = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    drawn = [tuple(sample_generator(*item).random(4)) for item in arguments]
    np.random.seed(7)
    assert drawn == [tuple(sample_generator(*item).random(4)) for item in arguments]
    assert len(set(drawn)) == len(drawn)


def test_generator_is_the_same_in_another_process():
    code = (
        "from dinov3_mm.datasets.order import sample_generator, torch_seed, Permutation;"
        "print(sample_generator(3, 'mask', 5, 6).integers(0, 1 << 62, 3).tolist(),"
        "torch_seed(3, 4, 5), Permutation(1000, 3, 2)(17))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    here = sample_generator(3, "mask", 5, 6).integers(0, 1 << 62, 3).tolist()
    assert result.stdout.split("\n")[0] == (
        f"{here} {torch_seed(3, 4, 5)} {Permutation(1000, 3, 2)(17)}"
    )


def test_neighbouring_items_share_no_numbers():
    values = np.concatenate([sample_generator(0, "x", index).random(2000) for index in range(50)])
    assert len(np.unique(values)) == len(values)
    assert stats.kstest(values, "uniform").pvalue > 1e-3


def test_torch_seed_is_valid_and_distinct():
    seeds = {torch_seed(s, i, o) for s in range(5) for i in range(50) for o in range(5)}
    assert len(seeds) == 5 * 50 * 5
    assert all(0 <= seed < 1 << 63 for seed in seeds)


@pytest.mark.parametrize("length", [*range(1, 60), 255, 256, 257, 1000, 4097])
def test_permutation_is_a_bijection(length):
    for epoch in range(3):
        permutation = Permutation(length, seed=1, epoch=epoch)
        assert sorted(permutation(index) for index in range(length)) == list(range(length))


def test_permutations_of_a_few_elements_are_equally_likely():
    counts = Counter(
        tuple(permutation(index) for index in range(4))
        for permutation in (Permutation(4, seed=0, epoch=epoch) for epoch in range(12000))
    )
    assert set(counts) == set(permutations(range(4)))
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_large_permutation_mixes_and_needs_no_memory():
    length = 10**12
    permutation = Permutation(length, seed=0)
    values = np.array([permutation(index) for index in range(2000)], np.float64) / length
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.08


def test_permutation_refuses_bad_arguments():
    with pytest.raises(ValueError, match="length >= 1, got 0"):
        Permutation(0, seed=0)
    with pytest.raises(IndexError, match="outside a permutation of length 5"):
        Permutation(5, seed=0)(5)
