"""In which order images are seen: functions of the sample position, without state.

An order maps the k-th sample of a run to the index of an image. It takes O(1) time and memory
whatever k, so a run resumes anywhere, and every process agrees on it.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

from dinov3_mm.datasets.randomness import Permutation

Order = Callable[[int], int]

# Slots in which every part gets its exact share; the shares are rounded to 1 / CYCLE.
CYCLE = 10_000
_KEPT_PERMUTATIONS = 8


class ShuffledCycles:
    """Position k of a sequence of cycles of equal length, each in an order of its own."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self._permutations: dict[int, Permutation] = {}

    def __call__(self, position: int) -> tuple[int, int]:
        """The cycle that a position falls into, and its element there."""
        cycle, slot = divmod(position, self.length)
        if cycle not in self._permutations:
            if len(self._permutations) >= _KEPT_PERMUTATIONS:
                self._permutations.clear()
            self._permutations[cycle] = Permutation(self.length, self.seed, cycle)
        return cycle, self._permutations[cycle](slot)


class EpochOrder:
    """Every image once per epoch, each epoch in another order.

    Args:
        length: number of images.
        seed: seed of the run, or of a part of a mixture.
    """

    def __init__(self, length: int, seed: int) -> None:
        self._cycles = ShuffledCycles(length, seed)

    def __call__(self, position: int) -> int:
        """Index of the image at a position."""
        return self._cycles(position)[1]


class Interleaving:
    """Shares out a sequence of slots among parts by ratio.

    In every :data:`CYCLE` slots each part gets its rounded share exactly, in random order, so the
    number of a part's slots before any slot is known without counting.

    Args:
        ratios: share of each part, positive; they are divided by their sum.
        seed: seed of the order.

    Raises:
        ValueError: If there is no ratio, or one is not positive or too small to get a slot.
    """

    def __init__(self, ratios: Sequence[float], seed: int) -> None:
        if not ratios or min(ratios) <= 0:
            raise ValueError(f"ratios must be positive numbers, one per part; got {list(ratios)}")
        self.shares = _rounded_shares(ratios)
        if min(self.shares) == 0:
            raise ValueError(
                f"ratios {list(ratios)}: the smallest is below 1/{CYCLE} of their sum; leave that "
                "part out"
            )
        self._starts = [0, *accumulate(self.shares)]
        self._cycles = ShuffledCycles(CYCLE, seed)

    def __call__(self, slot: int) -> tuple[int, int]:
        """The part that owns a slot, and how many of its slots came before."""
        cycle, element = self._cycles(slot)
        part = next(i for i in range(len(self.shares)) if element < self._starts[i + 1])
        return part, cycle * self.shares[part] + element - self._starts[part]


def _rounded_shares(ratios: Sequence[float]) -> list[int]:
    """Whole numbers of slots that sum to the cycle: rounded down, the rest by largest remainder."""
    exact = [ratio / sum(ratios) * CYCLE for ratio in ratios]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for index in by_remainder[: CYCLE - sum(shares)]:
        shares[index] += 1
    return shares
