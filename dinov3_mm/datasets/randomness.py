"""Random numbers as a pure function of (seed, stream, index).

Nothing here depends on the rank, the worker process or on what was drawn before, so a run that is
resumed, or that is spread over another number of processes, sees the same images, crops and masks.
"""

import hashlib
import math
from functools import lru_cache

import numpy as np

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
