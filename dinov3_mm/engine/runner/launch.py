"""Process groups for ``--launcher {none,pytorch,slurm}``, on CUDA or on CPU: begin and end.

MMEngine's own launcher selects a CUDA device even for gloo, so ranks without a GPU die in it. It
leaves a process group that exists alone, so this one is made before the runner.

On one node the ranks meet in a file and talk over the loopback interface: nothing listens to the
network. Several nodes need ``MASTER_ADDR``, which torchrun and the Slurm branch below set.
"""

import datetime
import gc
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from mmengine.dist import all_gather_object
from torch.distributed.device_mesh import DeviceMesh

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
    """
    if launcher == "none":
        return 1
    placement = find_placement(launcher, os.environ)
    _export(placement)
    if torch.cuda.is_available():
        _select_device(placement)
    dist.init_process_group(
        backend="nccl" if torch.cuda.is_available() else "gloo",
        rank=placement.rank,
        world_size=placement.world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
        **_meeting_point(placement),
    )
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
        RuntimeError: on the ranks where the body did not fail itself; with the other's message.
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
            raise RuntimeError(f"rank {rank} failed: {text}")


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
    os.environ["LOCAL_RANK"] = str(placement.local_rank)
    os.environ["LOCAL_WORLD_SIZE"] = str(placement.local_world_size)


def _select_device(placement: Placement) -> None:
    gpus = torch.cuda.device_count()
    if placement.local_world_size > gpus:
        raise ValueError(
            f"{placement.local_world_size} processes were started on a node with {gpus} GPU(s); "
            "start at most one per GPU, or hide the GPUs (CUDA_VISIBLE_DEVICES='') to train on CPU"
        )
    torch.cuda.set_device(placement.local_rank)


def _meeting_point(placement: Placement) -> dict[str, object]:
    """Arguments of ``init_process_group`` that say where the ranks find each other."""
    if placement.is_single_node:
        loopback = _loopback_interface()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
        return {"store": dist.FileStore(str(_store_file()), placement.world_size)}
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ["SLURM_STEP_NODELIST"]
        names = subprocess.check_output(["scontrol", "show", "hostnames", nodes], text=True)
        os.environ["MASTER_ADDR"] = names.split()[0]
        # Every rank of a step derives the same port; two steps of one node seldom share it.
        job = int(os.environ["SLURM_JOB_ID"]) * 31 + int(os.environ["SLURM_STEP_ID"])
        os.environ.setdefault("MASTER_PORT", str(20000 + job % 40000))
    return {"init_method": "env://"}


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
