"""Which sample positions a rank reads in which micro batch."""

from collections.abc import Iterator

from torch.utils.data import Sampler


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
