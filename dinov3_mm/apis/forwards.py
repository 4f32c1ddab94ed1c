"""Who runs the forward passes: the threads of a CPU side by side, or one device in a row."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch


class ForwardThreads:
    """Runs small batches side by side on a CPU, each on one thread.

    Several passes of one thread each get more out of the cores than one pass that shares every
    operation among them: nothing waits for the slowest thread dozens of times per block. While the
    context is open torch works with one thread per pass; on exit it has its threads back.

    Args:
        num_threads: passes at a time; 1 runs them at once in the calling thread.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[Future] = []

    def __enter__(self) -> "ForwardThreads":
        if self.num_threads > 1:
            torch.set_num_threads(1)
            self._pool = ThreadPoolExecutor(self.num_threads)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self.num_threads)

    def submit(self, function: Callable, *args: Any) -> Future:
        """Start a pass; the result is that of the future."""
        if self._pool is None:
            return _done(function, args)
        self._pending = [future for future in self._pending if not future.done()]
        self._pending.append(self._pool.submit(function, *args))
        return self._pending[-1]

    def run_alone(self, function: Callable, *args: Any) -> Future:
        """Run a pass with all threads to itself, after those that are under way."""
        if self._pool is None:
            return _done(function, args)
        for future in self._pending:
            future.exception()  # waits; the error is raised where the result is used
        torch.set_num_threads(self.num_threads)
        try:
            return _done(function, args)
        finally:
            torch.set_num_threads(1)


def _done(function: Callable, args: tuple) -> Future:
    future: Future = Future()
    future.set_result(function(*args))
    return future
