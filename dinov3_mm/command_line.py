"""How the programs of ``tools/`` end: one line for what their user can mend, a traceback for a bug.

Exit status: 0 done, 1 an error, 2 a wrong command line, 130 Ctrl-C. ``--traceback`` shows where an
error arose; the log file of a run has the traceback in any case.

What a user can mend is what this package refuses by a ``raise`` of its own, what the machine
refuses (files, disk, memory, network) and what a registry or a host finds wrong in a config. All
else is a bug, of this package or of one below it.
"""

import argparse
import dis
import errno
import hashlib
import logging
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import psutil

from .errors import nearest

FAILURE, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
TRACEBACK = "--traceback"

_OWN = (Path(__file__).resolve().parent, Path(__file__).resolve().parents[1] / "tools")
_HOSTS = re.compile(r"[/\\](mmengine|mmcv|mmpretrain|mmseg|mmdet)[/\\]")
_BUILDER = re.compile(r"[/\\]mmengine[/\\]registry[/\\]build_functions\.py$")
# What is raised on purpose, and yet for the author of the calling code.
_FOR_AUTHORS = (AssertionError, AttributeError, IndexError, NotImplementedError, StopIteration)
_FULL = "free space, or give another folder; a training goes on with --resume"
_ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "the file system or a limit of the shell (ulimit -f) takes no file of that size",
    errno.EACCES: "this user may not read or write there",
    errno.EPERM: "this user may not do that there",
    errno.EROFS: "the file system takes no files: give another folder",
    errno.EEXIST: "something of that name is in the way: remove it, or give another name",
    errno.ENOTDIR: "a file stands where a folder is needed: give another name",
    errno.EISDIR: "a folder stands where a file is needed: give another name",
    errno.ENOENT: "",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n), or use fewer loader workers",
    errno.EIO: "the disk or the network that it lies on does not answer",
    errno.ESTALE: "the disk or the network that it lies on does not answer",
    errno.ENAMETOOLONG: "give a shorter name",
}
_MEMORY = (
    "out of memory{where}: a smaller batch (train_cfg.global_batch_size, or "
    "train_dataloader.batch_size), train_cfg.accumulate=2 for the same batch in parts, "
    "model.backbone.with_cp=True, or smaller crops; tools/plan.py CONFIG says what a pretraining "
    "needs"
)
_FEWER_WORKERS = (
    "fewer loader workers (--cfg-options train_dataloader.num_workers=2), smaller images "
    "(decode_min_side) or a smaller batch"
)
_OF_ANOTHER_RANK = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|gloo/|NCCL|recvBytes|sendBytes|ProcessGroup"
    r"|Socket Timeout|wait timeout"
)


class ToolParser(argparse.ArgumentParser):
    """A parser with ``--traceback``; of several processes one says what is wrong."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument(
            TRACEBACK, action="store_true", help="show where an error arose, not its message alone"
        )

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and end with status 2."""
        if _is_mine_to_say(message):
            self.print_usage(sys.stderr)
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(USAGE)


def run_tool(
    main: Callable[[], int | None],
    *,
    interrupted: str = "interrupted",
    wants_all: bool | None = None,
) -> None:
    """Run a program and end the process with its status, unless that is 0.

    Args:
        main: the program; what it returns is the exit status, None is 0.
        interrupted: what to say after Ctrl-C.
        wants_all: leave errors to Python, which shows all; default: as the command line says.
    """
    wants_all = TRACEBACK in sys.argv if wants_all is None else wants_all
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        if wants_all:
            raise
        line = _line(interrupted)
        if line is not None:
            print(f"\n{line}", file=sys.stderr)
        status = INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (head, less) has seen enough; Python would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = BROKEN_PIPE
    except Exception as error:
        _to_log_file(error)
        if wants_all:
            raise
        # Python prints a text and ends with status 1.
        status = FAILURE if _follows_another(error) else _last_words(error) or FAILURE
    if status:
        sys.exit(status)


def explain(error: Exception) -> str | None:
    """What a user has to know of an error; None for one that is not the user's to mend."""
    for rule in (
        _of_package,
        _of_worker,
        _of_memory,
        _of_files,
        _of_registry,
        _of_constructor,
        _of_network,
        _of_missing_package,
    ):
        text = rule(error)
        if text:
            return text
    return None


def _of_package(error: Exception) -> str | None:
    """An error that this package raised, so with a message for people."""
    if isinstance(error, _FOR_AUTHORS) or not _is_raised(error, _is_own):
        return None
    return _text(error)


def _of_worker(error: Exception) -> str | None:
    """The same in a process of a data loader, which hands it on as text."""
    match = re.match(r"Caught (\w+) in DataLoader worker process \d+\.\n(.*)", str(error), re.S)
    if match is None:
        return None
    frames = list(re.finditer(r'^  File "([^"]+)", line \d+, in .*\n    (.*)$', match[2], re.M))
    end = re.search(r"^[\w.]+: (.*)\Z", match[2][frames[-1].end() if frames else 0 :], re.M | re.S)
    if end is None or not frames:
        return None
    is_refused = _is_own(frames[-1][1]) and frames[-1][2].startswith("raise ")
    is_of_files = match[1] in ("OSError", "FileNotFoundError", "PermissionError")
    return end[1].strip() if is_refused or is_of_files else None


def _of_memory(error: Exception) -> str | None:
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":  # of torch, on a GPU
        return _MEMORY.format(where=" on the GPU")
    if isinstance(error, MemoryError) or re.search(
        r"DefaultCPUAllocator|[Cc]an(?:not|'t) allocate memory|std::bad_alloc", text
    ):
        return _MEMORY.format(where="")
    if re.search(r"DataLoader worker.*(Bus error|shared memory)|unable to .*shared memory", text):
        return (
            "a loader worker ran out of shared memory (/dev/shm; in a container: --shm-size=8g): "
            + _FEWER_WORKERS
        )
    if re.search(r"DataLoader worker.*(killed by signal: Killed|exited unexpectedly)", text):
        return (
            "a loader worker was ended from outside, most often because the machine ran out of "
            f"memory: {_FEWER_WORKERS}"
        )
    return None


def _of_files(error: Exception) -> str | None:
    """What the operating system refuses, wherever it was asked."""
    if re.search(r"PytorchStreamWriter|unexpected pos|iostream error", str(error)):
        return f"a checkpoint could not be written ({_first_line(error)}): {_ADVICE[errno.ENOSPC]}"
    if type(error).__name__ == "UnpicklingError":
        return f"a checkpoint is damaged, or is none: {_first_line(error)}"
    match = re.search(r"\(os error (\d+)\)", str(error))  # of safetensors
    number = error.errno if isinstance(error, OSError) else match and int(match[1])
    if number not in _ADVICE or isinstance(error, BlockingIOError):
        return None
    path = getattr(error, "filename", None)
    where = f"{path}: " if path is not None else ""
    advice = _ADVICE[number] and f"; {_ADVICE[number]}"
    return f"{where}{os.strerror(number)}{advice}"


def _of_registry(error: Exception) -> str | None:
    """A ``type=`` of the config that nobody registered."""
    match = re.match(r"(\S+) is not in the (\S+) registry", _text(error))
    if not isinstance(error, KeyError) or match is None:
        return None
    registry = _locals(error).get("registry")
    names: set[str] = set()
    while registry is not None:
        names |= set(registry.module_dict)
        registry = registry.parent
    near = nearest(match[1], names)
    hint = f"did you mean {near!r}?" if near else "custom_imports must list the module that has it"
    return f"type={match[1]!r}: there is no {match[2].split('::')[-1]} of that name; {hint}"


def _of_constructor(error: Exception) -> str | None:
    """Arguments of the config that a class does not take."""
    build = next((f for f in reversed(_frames(error)) if _BUILDER.search(f[0])), None)
    cls = None if build is None else build[1].get("obj_cls")
    if cls is None:
        return None
    name, text = getattr(cls, "__name__", str(cls)), _text(error)
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if isinstance(error, TypeError) and unknown and unknown[1] in (build[1].get("args") or {}):
        from .errors import accepted_keywords

        near = nearest(unknown[1], accepted_keywords(cls) or ())
        hint = f"did you mean {near!r}?" if near else "see its documentation"
        return f"{name} has no argument {unknown[1]!r}; {hint}"
    if isinstance(error, TypeError) and re.search(r"missing \d+ required", text):
        return f"{name}: {text.split('() ')[-1]}"
    if _is_raised(error, _HOSTS.search) and str(error):
        return f"{name}: {text}"
    return None


def _of_network(error: Exception) -> str | None:
    if type(error).__name__ not in ("DistNetworkError", "DistStoreError"):
        return None
    return (
        f"the processes do not find each other ({_first_line(error)}): MASTER_ADDR and PORT must "
        "be the same on all machines, a free port of the first one"
    )


def _of_missing_package(error: Exception) -> str | None:
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    package = error.name.partition(".")[0]
    if package in ("dinov3_mm", "tools", "tests"):
        return None
    return f"the package {package} is not installed; docs/hosts.md and the README name the extras"


def _frames(error: BaseException) -> list[tuple[str, Mapping[str, Any]]]:
    """File and local variables of the calls, outermost first."""
    steps = traceback.walk_tb(error.__traceback__)
    return [(frame.f_code.co_filename, frame.f_locals) for frame, _ in steps]


def _locals(error: BaseException) -> Mapping[str, Any]:
    return _frames(error)[-1][1] if error.__traceback__ else {}


def _is_raised(error: BaseException, is_of: Callable[[str], Any]) -> bool:
    """Whether it began at a ``raise`` or ``assert`` in a file of a kind, not in an operation."""
    step: TracebackType | None = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    if step is None or not is_of(step.tb_frame.f_code.co_filename):
        return False
    return step.tb_frame.f_code.co_code[step.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _is_own(path: str) -> bool:
    return any(folder in Path(path).resolve().parents for folder in _OWN)


def _text(error: BaseException) -> str:
    # str() of a KeyError is a repr.
    is_quoted = isinstance(error, KeyError) and error.args
    return str(error.args[0] if is_quoted else error) or type(error).__name__


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _subject() -> str:
    """What a message is about: the config of the command line, else the program."""
    config = next((word for word in sys.argv[1:2] if word.endswith(".py")), None)
    return config or Path(sys.argv[0]).stem


def _line(text: str) -> str | None:
    """A message with what it is about; None where another process says it."""
    if not _is_mine_to_say(text):
        return None
    subject, rank = _subject(), _rank()
    if not rank and text.startswith(subject):
        return text
    return f"{subject}{f' (rank {rank})' if rank else ''}: {text}"


def _last_words(error: Exception) -> str | None:
    """One line, or the traceback of a bug; None where another process says it."""
    text = explain(error)
    if text is None and _rank() is not None and _OF_ANOTHER_RANK.search(str(error)):
        text = f"another process of this run has ended, or does not answer ({_first_line(error)})"
    if text is not None:
        return _line(text)
    # Of several processes those that stumbled at one place say it once.
    if not _is_mine_to_say("".join(traceback.format_tb(error.__traceback__))):
        return None
    last = "this is a bug, not a mistake of yours: please report it with the lines above"
    return f"{''.join(traceback.format_exception(error))}{_subject()}: {last}"


def _to_log_file(error: Exception) -> None:
    """Keep the traceback where the run keeps its messages."""
    if "mmengine" not in sys.modules:
        return
    from mmengine.logging import MMLogger

    for logger in list(MMLogger._instance_dict.values())[-1:]:
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                record = logger.makeRecord(
                    logger.name, logging.ERROR, __file__, 0, "the run ended with an error", (),
                    (type(error), error, error.__traceback__),
                )  # fmt: skip
                handler.handle(record)


def _rank() -> int | None:
    """Which of several processes this is; None for one alone."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if os.environ.get(size, "1") != "1" and rank in os.environ:
            return int(os.environ[rank])
    return None


def failure_files(parent: int | None = None) -> tuple[Path, str]:
    """Where the processes of one launch leave word of what they said: a folder, a beginning.

    Args:
        parent: process that launched them; default: the one above this one.
    """
    folder = Path(tempfile.gettempdir()) / f"dinov3_mm_{os.getuid()}"
    if "SLURM_PROCID" in os.environ and parent is None:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        return folder, "failed_" + "_".join(os.environ.get(name, "0") for name in names)
    process = psutil.Process(os.getppid() if parent is None else parent)
    return folder, f"failed_{process.pid}_{process.create_time():.2f}"


def _is_mine_to_say(text: str) -> bool:
    """Whether this process says it: of several that have the same to say the first one does.

    Ranks fail at the same place most of the time. Files settle it, since most refusals come before
    the ranks have found each other.
    """
    rank = _rank()
    if rank is None:
        return True
    folder, start = failure_files()
    path = folder / f"{start}_{hashlib.sha1(text.encode()).hexdigest()[:12]}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if rank and _appears(lambda: path.exists(), 5.0):  # rank 0 goes first
            return False
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def _follows_another(error: Exception) -> bool:
    """Whether it only says that another rank has failed, which that one has said itself."""
    if _rank() is None:
        return False
    is_other = type(error).__name__ == "OtherRankError" or _OF_ANOTHER_RANK.search(str(error))
    folder, start = failure_files()
    return bool(is_other) and _appears(lambda: any(folder.glob(f"{start}_*")), 3.0)


def _appears(is_there: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not is_there():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
