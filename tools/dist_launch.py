"""torchrun without its page on a process that failed: used by ``tools/dist_launch.sh``.

Takes torchrun's command line and is torchrun, but: a process that refuses something has said so in
one line, which is all that remains on the screen; the exit status is that of the process; SIGTERM,
SIGUSR1 and Ctrl-C are handed to the processes, which save and end, where torchrun would end them; a
second Ctrl-C ends them at once. ``--traceback`` among the program's arguments leaves its page.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dinov3_mm.command_line import FAILURE, INTERRUPTED, TRACEBACK, failure_files

# Left to torchrun, which ends the processes: those after which nobody waits for a checkpoint.
LEFT_TO_TORCHRUN = "SIGHUP,SIGQUIT"


class Forwarder:
    """Hands signals to the processes; each of them is a session of its own, out of Ctrl-C's reach.

    Attributes:
        is_interrupted: whether Ctrl-C came.
    """

    def __init__(self) -> None:
        self.is_interrupted = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._forward)

    def _forward(self, number: int, frame) -> None:
        children = psutil.Process().children()
        is_second = number == signal.SIGINT and self.is_interrupted
        self.is_interrupted |= number == signal.SIGINT
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                if is_second:
                    os.killpg(child.pid, signal.SIGKILL)
                else:
                    os.kill(child.pid, number)
        if is_second or not children:
            os._exit(128 + number)


def say_signal(failures: Mapping[int, ProcessFailure]) -> int:
    """The status of the process that failed first; say why, where it could not do so itself."""
    # torchrun ends the others with SIGTERM.
    own = {rank: each for rank, each in failures.items() if each.exitcode != -signal.SIGTERM}
    rank, first = min((own or failures).items(), key=lambda item: item[1].timestamp)
    if first.exitcode >= 0:
        return first.exitcode or FAILURE
    name = signal.Signals(-first.exitcode).name
    reason = {
        "SIGKILL": ": most often the machine ran out of memory (fewer loader workers, a smaller "
        "batch), or somebody ended it",
        "SIGBUS": ": most often /dev/shm or a disk is full",
    }.get(name, "")
    print(f"rank {rank} was ended by {name}{reason}", file=sys.stderr)
    return 128 - first.exitcode


def main() -> int:
    """Run torchrun; the exit status."""
    args = torchrun.parse_args(["--signals-to-handle", LEFT_TO_TORCHRUN, *sys.argv[1:]])
    is_quiet = TRACEBACK not in args.training_script_args
    if is_quiet:
        logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
        logger.setLevel(logging.CRITICAL)
    forwarder = Forwarder()
    try:
        torchrun.run(args)
        status = 0
    except ChildFailedError as error:
        if not is_quiet and not forwarder.is_interrupted:
            raise
        status = 0 if forwarder.is_interrupted else say_signal(error.failures)
    finally:
        folder, start = failure_files(os.getpid())
        for path in folder.glob(f"{start}_*"):
            path.unlink(missing_ok=True)
        if "store_type=file" in args.rdzv_conf:
            Path(args.rdzv_endpoint).unlink(missing_ok=True)
    return INTERRUPTED if forwarder.is_interrupted else status


if __name__ == "__main__":
    sys.exit(main())
