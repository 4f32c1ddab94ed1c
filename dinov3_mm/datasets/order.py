"""Which image is seen when: random numbers, orders and positions as functions of (seed, index)."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
from torch.utils.data import Sampler

# --- Random numbers as a pure function of (seed, stream, index) ---
#
# Nothing here depends on the rank, the worker process or on what was drawn before, so a run that
# is resumed, or that is spread over another number of processes, sees the same images, crops and
# masks.


_UINT64 = (1 << 64) - 1
_ROUNDS = 8


@lru_cache(maxsize=256)
def _stream_key(seed: int, stream: str | int) -> int:
    """128-bit key that separates the streams of one seed."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def sample_generator(
    seed: int, stream: str | int, index: int, sub_index: int = 0
) -> np.random.Generator:
    """Generator that belongs to one item of one stream.

    The stream is the key and the item the high words of the counter of a Philox generator, so two
    items never overlap: each owns 2^128 counter values.

    Args:
        seed (int): Seed of the run.
        stream (str | int): What the numbers are for, such as ``'augment'`` or ``'mask'``.
        index (int): Item within the stream (a sample position, an iteration), ``>= 0``.
        sub_index (int): Second coordinate of the item, ``>= 0``.

    Returns:
        np.random.Generator: The same numbers for the same arguments, in any process.
    """
    counter = [0, 0, index & _UINT64, sub_index & _UINT64]
    return np.random.Generator(np.random.Philox(key=_stream_key(seed, stream), counter=counter))


def torch_seed(seed: int, iteration: int, offset: int = 0) -> int:
    """Seed in ``[0, 2^63)`` for ``torch.manual_seed`` of one iteration.

    Args:
        seed (int): Seed of the run.
        iteration (int): Optimizer step.
        offset (int): What must differ between processes, e.g. the first global sample position of
            the rank, so that ranks draw different noise for their different samples.
    """
    digest = hashlib.blake2b(f"{seed}/torch/{iteration}/{offset}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Permutation:
    """Pseudo-random permutation of ``range(length)`` in O(1) memory and O(1) time per element.

    A Feistel network on an ``a x a`` grid, ``a = ceil(sqrt(length))``; values past the end are
    walked on until they fall inside, which takes fewer than 2 steps on average for ``length > 8``.

    Args:
        length (int): Number of elements, ``>= 1``.
        seed (int): Seed of the run.
        epoch (int): Each epoch is another permutation.

    Raises:
        ValueError: If ``length < 1``.
    """

    def __init__(self, length: int, seed: int, epoch: int = 0) -> None:
        if length < 1:
            raise ValueError(f"a permutation needs length >= 1, got {length}")
        self.length = length
        self._side = max(2, math.isqrt(length - 1) + 1)
        keys = sample_generator(seed, "permutation", epoch).integers(0, 1 << 64, _ROUNDS, np.uint64)
        self._keys = [int(key) for key in keys]

    def __len__(self) -> int:
        return self.length

    def __call__(self, index: int) -> int:
        """Element at ``index``, ``0 <= index < length``."""
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside a permutation of length {self.length}")
        side, value = self._side, index
        while True:
            left, right = divmod(value, side)
            for key in self._keys:
                left, right = right, (left + _mix(right ^ key)) % side
            value = left * side + right
            if value < self.length:
                return value


def _mix(value: int) -> int:
    """Finaliser of SplitMix64: every input bit reaches every output bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _UINT64
    return value ^ (value >> 31)


# --- In which order images are seen: functions of the sample position, without state ---
#
# An order maps the k-th sample of a run to the index of an image. It takes O(1) time and memory
# whatever k, so a run resumes anywhere, and every process agrees on it.


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


# --- Which sample positions a rank reads in which micro batch ---


class BatchLayout:
    """How the global sample counter is cut into iterations, micro batches and ranks.

    Position ``p = iteration * global_batch_size + micro * micro_batch_size + rank * rank_batch_size
    + j``; everything random about a sample is a function of ``p``, and nothing of the cut.

    Args:
        global_batch_size (int): Images per optimizer step over all ranks.
        world_size (int): Number of ranks.
        accumulate (int): Micro batches per optimizer step.
        surplus (bool): Where the ranks do not divide a micro batch, let each read one image more
            than its share: the last ranks then read its first images again.

    Raises:
        ValueError: If the global batch cannot be cut evenly.
    """

    def __init__(
        self,
        global_batch_size: int,
        world_size: int = 1,
        accumulate: int = 1,
        *,
        surplus: bool = False,
    ) -> None:
        for name, value in (
            ("global_batch_size", global_batch_size),
            ("world_size", world_size),
            ("accumulate", accumulate),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        step = accumulate if surplus else world_size * accumulate
        if global_batch_size % step:
            nearest = max(step, round(global_batch_size / step) * step)
            raise ValueError(
                f"global_batch_size={global_batch_size} is not divisible by world_size * "
                f"accumulate = {world_size} * {accumulate} = {world_size * accumulate}; use e.g. "
                f"{nearest}"
            )
        self.global_batch_size = global_batch_size
        self.world_size = world_size
        self.accumulate = accumulate
        self.micro_batch_size = global_batch_size // accumulate
        self.rank_batch_size = -(-self.micro_batch_size // world_size)

    def first_position(self, iteration: int, micro: int, rank: int) -> int:
        """Position of the first sample that ``rank`` reads in this micro batch."""
        return self.positions(iteration, micro, rank)[0]

    def positions(self, iteration: int, micro: int, rank: int) -> list[int]:
        """Positions that ``rank`` reads in this micro batch."""
        step = iteration * self.global_batch_size + micro * self.micro_batch_size
        first = rank * self.rank_batch_size
        return [
            step + place % self.micro_batch_size
            for place in range(first, first + self.rank_batch_size)
        ]


class PositionBatchSampler(Sampler[list[int]]):
    """Yields lists of sample positions: one list is one micro batch of one rank.

    Args:
        global_batch_size (int): Images per optimizer step over all ranks.
        rank (int): This process.
        world_size (int): Number of processes.
        accumulate (int): Micro batches per optimizer step.
        surplus (bool): See :class:`BatchLayout`.
        start_iter (int): First optimizer step; skipping costs nothing.
        max_iters (int): Optimizer step to stop before.

    Raises:
        ValueError: If the rank is outside the world or the global batch cannot be cut evenly.
    """

    def __init__(
        self,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        accumulate: int = 1,
        surplus: bool = False,
        start_iter: int = 0,
        max_iters: int,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        if not 0 <= start_iter <= max_iters:
            raise ValueError(f"need 0 <= start_iter <= max_iters, got {start_iter} and {max_iters}")
        self.layout = BatchLayout(global_batch_size, world_size, accumulate, surplus=surplus)
        self.rank = rank
        self.start_iter = start_iter
        self.max_iters = max_iters

    @property
    def batch_size(self) -> int:
        """Positions in each list; MMEngine's runner asks for it."""
        return self.layout.rank_batch_size

    def __len__(self) -> int:
        return (self.max_iters - self.start_iter) * self.layout.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        layout = self.layout
        for iteration in range(self.start_iter, self.max_iters):
            for micro in range(layout.accumulate):
                yield layout.positions(iteration, micro, self.rank)
