"""Process groups for ``--launcher {none,pytorch,slurm}``, on CUDA or on CPU: begin and end.

MMEngine's own launcher selects a CUDA device even for gloo, so ranks without a GPU die in it. It
leaves a process group that exists alone, so this one is made before the runner.

On one node nothing listens to the network: ranks talk over the loopback interface. torchrun's meet
in a file that is named after their parent. Slurm's may run in containers, each with processes and
temporary files of its own, so they meet at a port of the loopback interface that follows from job,
step and restart. Several nodes meet at such a port of the first one; torchrun sets ``MASTER_ADDR``.
"""

import contextlib
import datetime
import gc
import os
import re
import signal
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from mmengine.dist import all_gather_object, all_reduce, is_main_process
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dinov3_mm.features.frozen import OtherRankError

from .run_files import occupied

LAUNCHERS = ("none", "pytorch", "slurm")


@dataclass(frozen=True)
class Placement:
    """Where this process stands among those that were launched together."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_single_node(self) -> bool:
        return self.world_size == self.local_world_size


def start_processes(launcher: str, *, timeout_s: float = 1800.0) -> int:
    """Create the default process group of this launcher (none for ``'none'``).

    NCCL and this process's own CUDA device where there are GPUs, else gloo.

    Args:
        launcher (str): ``'none'``, ``'pytorch'`` (torchrun's environment) or ``'slurm'``.
        timeout_s (float): Seconds after which a collective that a rank does not join fails.

    Returns:
        int: Number of processes.

    Raises:
        ValueError: If the launcher is unknown, its environment is missing, or a node has fewer GPUs
            than processes.
        RuntimeError: If the port at which Slurm's ranks meet is taken.
    """
    if launcher == "none":
        return 1
    placement = find_placement(launcher, os.environ)
    _export(placement)
    if torch.cuda.is_available():
        torch.cuda.set_device(device_index(placement))
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(
        backend="nccl" if torch.cuda.is_available() else "gloo",
        rank=placement.rank,
        world_size=placement.world_size,
        timeout=timeout,
        **_meeting_point(launcher, placement, timeout),
    )
    if torch.cuda.is_available() and sees_one_of_several(placement):
        refuse_shared_device(_own_device())
    return placement.world_size


def end_processes() -> None:
    """Destroy all process groups and join their threads; all ranks must call this.

    To be called once, when nothing but what Python would throw away refers to the run: a group that
    outlives this call still has running threads when the interpreter ends, which aborts the process
    ("terminate called without an active exception").
    """
    if not dist.is_initialized():
        return
    dist.barrier()  # a rank that is late may still need the others
    # A run is full of reference cycles; units of FSDP2 among them hold groups.
    gc.collect()
    # torch's caches of operators on shards keep meshes for good, and a mesh holds its groups.
    for mesh in [found for found in gc.get_objects() if issubclass(type(found), DeviceMesh)]:
        getattr(mesh, "_pg_registry", {}).clear()
    dist.destroy_process_group()


@contextmanager
def failing_together() -> Iterator[None]:
    """A context that all ranks enter, and that ends with an error on all of them or on none.

    For what one rank does while the others go on to wait for it: writing, moving files. The body
    must not communicate.

    Raises:
        OtherRankError: on the ranks where the body did not fail itself; with the other's message.
    """
    error = None
    try:
        yield
    except Exception as caught:  # the others must hear of whatever it is
        error = caught
    texts = all_gather_object(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise OtherRankError(f"rank {rank} failed: {text}")


def find_placement(launcher: str, environment: Mapping[str, str]) -> Placement:
    """Read rank and world size from the environment that the launcher set.

    Raises:
        ValueError: If the launcher is unknown or a variable is missing.
    """
    if launcher == "pytorch":
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif launcher == "slurm":
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    else:
        raise ValueError(f"launcher must be one of {', '.join(LAUNCHERS)}, got {launcher!r}")
    missing = [name for name in names if name not in environment]
    if missing:
        starter = "torchrun (tools/dist_train.sh)" if launcher == "pytorch" else "srun"
        raise ValueError(
            f"launcher {launcher!r} needs {', '.join(missing)} in the environment: "
            f"start the script with {starter}, or use --launcher none for one process"
        )
    # Slurm writes '8(x2)' for two nodes of eight tasks.
    values = [int(environment[name].split("(")[0].split(",")[0]) for name in names]
    return Placement(*values)


def _export(placement: Placement) -> None:
    """Set the variables that MMEngine and torch read on any launcher."""
    os.environ["RANK"] = str(placement.rank)
    os.environ["WORLD_SIZE"] = str(placement.world_size)
    # Both take it for the index of this process's GPU.
    os.environ["LOCAL_RANK"] = str(device_index(placement))
    os.environ["LOCAL_WORLD_SIZE"] = str(placement.local_world_size)


def device_index(placement: Placement) -> int:
    """Index of this process's GPU among those that it sees; without GPUs its place on the node.

    Where a process sees one GPU (``srun --gpus-per-task=1``), that is its own.

    Raises:
        ValueError: If a process sees several GPUs, but fewer than there are processes.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    if gpus is None or placement.local_world_size <= gpus:
        return placement.local_rank
    if gpus == 1:
        return 0
    raise ValueError(_too_many(placement.local_world_size, gpus))


def sees_one_of_several(placement: Placement) -> bool:
    """Whether this process sees one GPU and must trust that the others see others."""
    return placement.local_world_size > 1 and torch.cuda.device_count() == 1


def refuse_shared_device(own: str) -> None:
    """Refuse processes that see the same GPU; all ranks must call this.

    Args:
        own: what names this process's GPU in the whole world.

    Raises:
        ValueError: on all ranks.
    """
    # NCCL would fail in its first message, without saying why.
    group = dist.new_group(backend="gloo")
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own, group=group)
    dist.destroy_process_group(group)
    name, count = Counter(everyone).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{_too_many(count, 1)} (all of them see {name})")


def _own_device() -> str:
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    return f"GPU {uuid} of {socket.gethostname()}"


def _too_many(processes: int, gpus: int) -> str:
    return (
        f"{processes} processes were started on a node with {gpus} GPU(s); "
        "start at most one per GPU, or hide the GPUs (CUDA_VISIBLE_DEVICES='') to train on CPU"
    )


def _meeting_point(
    launcher: str, placement: Placement, timeout: datetime.timedelta
) -> dict[str, object]:
    """Arguments of ``init_process_group`` that say where the ranks find each other."""
    if placement.is_single_node:
        loopback = _loopback_interface()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
        if launcher == "slurm":
            return {"store": _loopback_store(placement, timeout)}
        return {"store": dist.FileStore(str(_store_file()), placement.world_size)}
    if launcher == "slurm":
        if "MASTER_ADDR" not in os.environ:
            # Containers seldom have scontrol, which would list the hosts.
            os.environ["MASTER_ADDR"] = first_host(_slurm("SLURM_STEP_NODELIST"))
        os.environ.setdefault("MASTER_PORT", str(slurm_port(os.environ)))
    return {"init_method": "env://"}


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: ``gpu[003-010,12],login1`` begins with gpu003.

    Raises:
        ValueError: If it is no such list.
    """
    match = re.match(r"(?:[^,\[\]]|\[\d+[^\]]*\])+", nodes)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} is no list of hosts; set MASTER_ADDR")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def slurm_port(environment: Mapping[str, str]) -> int:
    """Port at which the ranks of a job step meet, below those that systems give away themselves.

    Job, step and restart (``SLURM_JOB_ID``, ``SLURM_STEP_ID``, ``SLURM_RESTART_COUNT``) settle it:
    jobs and steps that share a node have others.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, restart = (int(environment.get(name) or 0) for name in names)
    return 10000 + (job * 131 + step * 7 + restart) % 20000


def _slurm(name: str) -> str:
    if name not in os.environ:
        raise ValueError(f"launcher 'slurm' needs {name} in the environment, or MASTER_ADDR")
    return os.environ[name]


def _loopback_store(placement: Placement, timeout: datetime.timedelta) -> dist.TCPStore:
    """A store of the first rank that only processes of this machine reach."""
    port = int(os.environ.get("MASTER_PORT") or slurm_port(os.environ))
    listener = None
    if placement.rank == 0:
        # torch would listen to the network.
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                own.bind(("127.0.0.1", port))
            except OSError as error:
                raise RuntimeError(
                    f"the ranks of this job step meet at port {port} of this node, which cannot be "
                    f"used ({error}): export another MASTER_PORT before srun"
                ) from None
            own.listen(placement.world_size)
            listener = own.detach()
    return dist.TCPStore(
        "127.0.0.1",
        port,
        placement.world_size,
        is_master=placement.rank == 0,
        timeout=timeout,
        master_listen_fd=listener,
    )


def _store_file() -> Path:
    """A file that all ranks of one launch, and only they, agree on: named after their parent."""
    folder = Path(tempfile.gettempdir()) / f"dinov3_mm_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user; set TMPDIR to a folder of yours")
    parent = psutil.Process(os.getppid())
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return folder / f"{parent.pid}_{parent.create_time():.2f}_{restart}"


def _loopback_interface() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return "lo" if "lo" in names else next(name for name in names if name.startswith("lo"))


# --- Signals that ask a training to save and end ---


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
