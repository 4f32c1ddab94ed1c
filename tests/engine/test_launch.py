"""Ranks from the launchers' environments; the launch scripts."""

import multiprocessing
import os
import socket
import subprocess
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dinov3_mm.engine import launch
from dinov3_mm.engine.launch import (
    Placement,
    device_index,
    end_processes,
    failing_together,
    find_placement,
    first_host,
    refuse_shared_device,
    slurm_port,
    start_processes,
)
from dinov3_mm.engine.strategies.ddp import training_device

TOOLS = Path(__file__).parents[2] / "tools"


def test_one_process_needs_no_group():
    assert start_processes("none") == 1


def gloo_threads() -> int:
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="lists threads as Linux does")
def test_groups_end_with_their_threads():
    before = gloo_threads()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    # A dimension of its own has a group of its own.
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    model(torch.ones(1, 4)).sum().backward()
    assert gloo_threads() > before
    model.itself = [model]
    del model, mesh
    end_processes()
    assert not dist.is_initialized()
    assert gloo_threads() == before
    end_processes()  # nothing to do


def test_torchrun():
    environment = dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4")
    placement = find_placement("pytorch", environment)
    assert placement == Placement(rank=5, world_size=8, local_rank=1, local_world_size=4)
    assert not placement.is_single_node


@pytest.mark.parametrize("per_node, single", [("4", True), ("2(x2)", False), ("3,1", False)])
def test_slurm(per_node, single):
    environment = dict(
        SLURM_PROCID="3",
        SLURM_NTASKS="4",
        SLURM_LOCALID="1",
        SLURM_STEP_TASKS_PER_NODE=per_node,
    )
    placement = find_placement("slurm", environment)
    assert (placement.rank, placement.world_size, placement.local_rank) == (3, 4, 1)
    assert placement.is_single_node is single


def of_slurm(rank: int, folder: Path, *, job: int = 4711, world: int = 2, **more: str) -> dict:
    """Variables of a task that runs in a container of its own: with its own temporary files."""
    private = folder / f"tmp_{job}_{rank}"
    private.mkdir(parents=True, exist_ok=True)
    return dict(
        SLURM_PROCID=str(rank),
        SLURM_NTASKS=str(world),
        SLURM_LOCALID=str(rank),
        SLURM_STEP_TASKS_PER_NODE=str(world),
        SLURM_JOB_ID=str(job),
        SLURM_STEP_ID="0",
        TMPDIR=str(private),
        **more,
    )


def run_tasks(task, environments: list[dict]) -> list:
    """What ``task`` returns in processes that have no parent in common, or its error in words."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def rank(index, environment):
        os.environ.update(environment)
        try:
            start_processes("slurm", timeout_s=30)
            answer = task(index)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        answers.put((index, answer))
        answers.close()
        os._exit(0)  # nothing of the test's own process is to be torn down here

    def parent(*arguments):
        child = context.Process(target=rank, args=arguments)
        child.start()
        child.join()

    parents = [context.Process(target=parent, args=pair) for pair in enumerate(environments)]
    for process in parents:
        process.start()
    found = dict(answers.get() for _ in parents)
    for process in parents:
        process.join()
    return [found[index] for index in range(len(environments))]


def test_slurm_ranks_of_two_jobs_on_a_node_meet_in_their_containers(tmp_path):
    """No parent, no temporary folder in common; and nothing listens to the network."""

    def task(index):
        total = torch.tensor([10.0**index])
        dist.all_reduce(total)
        listening = [
            each.laddr.ip
            for each in psutil.Process().net_connections(kind="tcp")
            if each.status == psutil.CONN_LISTEN
        ]
        dist.barrier()
        return total.item(), set(listening)

    tasks = [of_slurm(rank, tmp_path, job=job) for job in (4711, 4712) for rank in (0, 1)]
    answers = run_tasks(task, tasks)
    assert [total for total, _ in answers] == [11.0, 11.0, 1100.0, 1100.0]
    assert all(address.startswith("127.") for _, found in answers for address in found)


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (answer,) = run_tasks(
            lambda index: None, [of_slurm(0, tmp_path, world=1, MASTER_PORT=str(port))]
        )
    assert f"meet at port {port} of this node, which cannot be used" in answer
    assert "export another MASTER_PORT before srun" in answer


def test_jobs_steps_and_restarts_have_ports_of_their_own():
    ports = {
        slurm_port(dict(SLURM_JOB_ID=f"{j}", SLURM_STEP_ID=f"{s}", SLURM_RESTART_COUNT=f"{r}"))
        for j in range(19999, 20020)
        for s in range(8)
        for r in range(7)
    }
    assert len(ports) == 21 * 8 * 7
    # Below what Linux hands out to whoever asks for any port.
    assert min(ports) >= 1024 and max(ports) < 32768
    assert slurm_port(dict(SLURM_JOB_ID="5")) == slurm_port(dict(SLURM_JOB_ID="5"))


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("gpu[003-010,12],login1", "gpu003"),
        ("n1,n2", "n1"),
        ("node7", "node7"),
        ("rack[1-2]node[04,7]x,b", "rack1node04x"),
    ],
)
def test_first_host_of_a_list(nodes, host):
    assert first_host(nodes) == host


def test_no_list_of_hosts():
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST='' is no list of hosts"):
        first_host("")


@pytest.mark.parametrize("gpus, index", [(4, 3), (8, 3), (1, 0)])
def test_device_of_a_process(monkeypatch, gpus, index):
    """With one visible GPU per task that one, whatever the task's place on the node."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert device_index(Placement(rank=3, world_size=4, local_rank=3, local_world_size=4)) == index


def test_the_strategy_trains_on_the_one_visible_gpu(monkeypatch):
    """MMEngine and the strategies take ``LOCAL_RANK`` for the index of the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    launch._export(Placement(rank=3, world_size=4, local_rank=3, local_world_size=4))
    assert training_device() == torch.device("cuda", 0)
    assert (os.environ["RANK"], os.environ["LOCAL_WORLD_SIZE"]) == ("3", "4")


def test_several_nodes_meet_at_the_first_without_scontrol(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for name, value in dict(
        SLURM_STEP_NODELIST="gpu[07-08]", SLURM_JOB_ID="5", SLURM_STEP_ID="0"
    ).items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    two_nodes = Placement(rank=1, world_size=2, local_rank=0, local_world_size=1)
    point = launch._meeting_point("slurm", two_nodes, timedelta(seconds=1))
    assert point == {"init_method": "env://"}
    assert os.environ["MASTER_ADDR"] == "gpu07"
    assert os.environ["MASTER_PORT"] == str(slurm_port(os.environ))


def test_too_few_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"4 processes were started on a node with 2 GPU\(s\)"):
        device_index(Placement(rank=3, world_size=4, local_rank=3, local_world_size=4))


@pytest.mark.parametrize("gpus", ["ab", "aa"])
def test_one_visible_device_for_each_task(tmp_path, gpus):
    def task(index):
        refuse_shared_device(f"GPU {gpus[index]} of node1")
        return "different"

    answers = run_tasks(task, [of_slurm(rank, tmp_path) for rank in (0, 1)])
    refusal = "ValueError: 2 processes were started on a node with 1 GPU(s); start at most one per"
    expected = "different" if gpus == "ab" else refusal
    assert all(answer.startswith(expected) for answer in answers)


def test_an_error_of_one_rank_is_one_of_all(tmp_path):
    def task(index):
        with failing_together():
            if index == 1:
                raise FileExistsError("it is there")
        return "went on"

    answers = run_tasks(task, [of_slurm(rank, tmp_path) for rank in (0, 1)])
    assert answers == [
        "OtherRankError: rank 1 failed: FileExistsError: it is there",
        "FileExistsError: it is there",
    ]


def test_missing_environment_says_how_to_start():
    with pytest.raises(ValueError, match=r"needs RANK, WORLD_SIZE.*start the script with torchrun"):
        find_placement("pytorch", {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    with pytest.raises(ValueError, match="with srun"):
        find_placement("slurm", {})
    with pytest.raises(ValueError, match="must be one of none, pytorch, slurm, got 'mpi'"):
        find_placement("mpi", {})


def run_with_fake_commands(tmp_path, script, arguments, commands, **environment):
    """Run a launch script with programs that print what they were called with."""
    for name in commands:
        fake = tmp_path / name
        fake.write_text(
            '#!/bin/bash\necho "CUDA=${CUDA_VISIBLE_DEVICES-unset}"; printf "%s\\n" "$@"\n'
        )
        fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **environment}
    for name in ("CUDA_VISIBLE_DEVICES", "PYTHON"):
        environment.pop(name, None)
    done = subprocess.run(
        ["bash", TOOLS / script, *arguments], env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout.split("\n"), done.stderr


def test_dist_train_with_zero_gpus_is_one_process_without_cuda(tmp_path):
    code, words, _ = run_with_fake_commands(
        tmp_path, "dist_train.sh", ["c.py", "0", "--seed", "3"], ["python"]
    )
    assert code == 0
    assert words[0] == "CUDA="
    assert words[1].endswith("tools/train.py")
    assert words[2:5] == ["c.py", "--seed", "3"]


def test_dist_train_meets_in_a_file(tmp_path):
    code, words, _ = run_with_fake_commands(
        tmp_path, "dist_train.sh", ["c.py", "3", "--cfg-options", "a=b c"], ["python"]
    )
    assert code == 0
    assert words[1].endswith("tools/dist_launch.py")
    assert words[words.index("--nproc-per-node") + 1] == "3"
    assert words[words.index("--rdzv-conf") + 1] == "store_type=file"
    assert words[-6:-1] == ["c.py", "--launcher", "pytorch", "--cfg-options", "a=b c"]


@pytest.mark.parametrize("script", ["dist_train.sh", "slurm_train.sh"])
def test_scripts_say_how_to_use_them(tmp_path, script):
    code, _, errors = run_with_fake_commands(tmp_path, script, ["c.py"], [])
    assert code == 2
    assert "usage:" in errors
