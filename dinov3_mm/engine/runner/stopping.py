"""Signals that ask a training to save and end: Ctrl-C, and those of schedulers."""

import contextlib
import os
import signal
import sys
import threading

import torch
from mmengine.dist import all_reduce, is_main_process

from dinov3_mm.engine.runner.files import occupied
from dinov3_mm.engine.runner.launch import failing_together

# Ctrl-C, and what schedulers announce the end of an allocation with.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# Processes agree on a stop this often (in steps); a signal reaches them at different times.
AGREEMENT_INTERVAL = 10

_AT_ONCE = "(Ctrl-C again ends at once, without saving)"
_NOTICE = f"Ctrl-C: saving after this step, or after an evaluation that runs {_AT_ONCE}\n"
_NOTICE_OF_SEVERAL = f"Ctrl-C: saving within {AGREEMENT_INTERVAL} steps, then ending {_AT_ONCE}\n"
_SHOW_CURSOR = "\x1b[?25h"


class SavedAndStoppedError(KeyboardInterrupt):
    """A downstream training has saved and leaves MMEngine's loop, which has no other way out.

    No ``Exception``: nobody but :func:`run_training` is to catch it.
    """


class StopRequest:
    """Listens for the signals while a training runs.

    After the first Ctrl-C the second one has its usual effect on a process without handler, which
    is immediate even where the process waits for others.

    Attributes:
        agreed: the signal after which all processes stop; None: none came.
    """

    def __init__(self) -> None:
        self.agreed: signal.Signals | None = None
        self._came: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def listen(self) -> None:
        """Take the signals; only a main thread can. Those that are ignored stay ignored."""
        self._process = os.getpid()
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._remember)

    def release(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def is_agreed(self, done: int, *, distributed: bool) -> bool:
        """Whether to save and end after ``done`` steps; all processes ask, and answer alike."""
        if not distributed:
            self.agreed = self._came
        elif done % AGREEMENT_INTERVAL == 0:
            came = 0 if self._came is None else 1 + (self._came == signal.SIGINT)
            asked = torch.tensor(float(came))
            all_reduce(asked, "max")
            self.agreed = (None, signal.SIGTERM, signal.SIGINT)[int(asked)]
        return self.agreed is not None

    def in_words(self) -> str:
        """By what the run was stopped."""
        return "Ctrl-C" if self.agreed == signal.SIGINT else "a signal"

    def _remember(self, number: int, frame) -> None:
        # Loader workers inherit the handler, and Ctrl-C reaches them too: they go on loading.
        if os.getpid() != self._process:
            return
        self._came = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            self._tell()

    def _tell(self) -> None:
        """Say that Ctrl-C was heard; logging may be in the middle of a message."""
        if os.environ.get("RANK", "0") != "0":
            return
        is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
        cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""  # a live bar hides it
        with contextlib.suppress(OSError):
            os.write(2, f"{cursor}{_NOTICE if is_alone else _NOTICE_OF_SEVERAL}".encode())


def run_training(runner) -> signal.Signals | None:
    """Train.

    Returns:
        The signal by which the training was stopped; None if it came to its end.

    Raises:
        ValueError: another process trains into the same work folder.
    """
    with contextlib.ExitStack() as stack:
        with failing_together():
            if is_main_process():
                stack.enter_context(occupied(runner.work_dir))
        try:
            runner.train()
        except SavedAndStoppedError:
            runner.call_hook("after_train")
            runner.call_hook("after_run")
    stops = (getattr(hook, "stop", None) for hook in runner.hooks)
    return next((s.agreed for s in stops if isinstance(s, StopRequest) and s.agreed), None)
