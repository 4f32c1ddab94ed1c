"""``tools/dist_test.sh`` and ``tools/slurm_test.sh``: the commands that they run."""

import os
import subprocess
from pathlib import Path

import pytest

from dinov3_mm.commands.heads import parse_args

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = "configs/quickstart/scenes_pretrain.py"


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(REPOSITORY / "tools" / script), *arguments],
        env={**os.environ, **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def python(tmp_path):
    """A python that prints its arguments."""
    path = tmp_path / "python"
    path.write_text('#!/usr/bin/env bash\nprintf "<%s> " "${@#$ROOT/}"\n')
    path.chmod(0o755)
    return str(path)


def test_one_process(python):
    result = run(
        "dist_test.sh", "c.py", "head.pth", "0", "--tta", PYTHON=python, ROOT=str(REPOSITORY)
    )
    assert result.stdout == "<tools/test.py> <c.py> <head.pth> <--tta> "


def test_several_processes_without_checkpoint(python):
    result = run(
        "dist_test.sh", "c.py", "-", "2", "--head", "a b", PYTHON=python, ROOT=str(REPOSITORY)
    )
    assert result.stdout.endswith(
        "<--nproc-per-node> <2> <tools/test.py> <c.py> <--launcher> <pytorch> <--head> <a b> "
    )


def test_slurm():
    result = run(
        "slurm_test.sh", "gpus", "job", CONFIG, "head.pth", "--tta", GPUS="16", DRY_RUN="1"
    )
    words = result.stdout.split()
    assert words[0] == "srun" and "--nodes=2" in words and "--ntasks=16" in words
    assert words[-5:] == [CONFIG, "head.pth", "--launcher", "slurm", "--tta"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpus", "job", CONFIG], "usage: "),
        (["gpus", "job", "no.py", "-"], "there is no config no.py"),
    ],
)
def test_slurm_refuses(arguments, message):
    result = run("slurm_test.sh", *arguments)
    assert result.returncode == 2 and message in result.stderr


def test_dist_refuses():
    result = run("dist_test.sh", "c.py", "head.pth")
    assert result.returncode == 2 and "usage: " in result.stderr


def test_the_checkpoint_may_stand_after_options():
    args = parse_args(["c.py", "--launcher", "none", "head.pth", "--cfg-options", "a=1", "b=2"])
    assert (args.config, args.checkpoint) == ("c.py", "head.pth")
    assert args.cfg_options == ["a=1", "b=2"]
    assert parse_args(["c.py", "--tta"]).checkpoint is None
