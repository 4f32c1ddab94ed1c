"""Ranks from the launchers' environments; the launch scripts."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dinov3_mm.engine.runner.launch import (
    Placement,
    end_processes,
    find_placement,
    start_processes,
)

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
    assert words[1:3] == ["-m", "torch.distributed.run"]
    assert words[words.index("--nproc-per-node") + 1] == "3"
    assert words[words.index("--rdzv-conf") + 1] == "store_type=file"
    assert words[-6:-1] == ["c.py", "--launcher", "pytorch", "--cfg-options", "a=b c"]


@pytest.mark.parametrize("script", ["dist_train.sh", "slurm_train.sh"])
def test_scripts_say_how_to_use_them(tmp_path, script):
    code, _, errors = run_with_fake_commands(tmp_path, script, ["c.py"], [])
    assert code == 2
    assert "usage:" in errors
