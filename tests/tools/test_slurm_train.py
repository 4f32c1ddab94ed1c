"""``tools/slurm_train.sh`` without Slurm: what it would submit, and a job that is requeued."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dinov3_mm.engine.run_files import list_checkpoints
from tests.integration.toy_run import toy_config, write_images
from tests.integration.traces import read_trace

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = "configs/dinov3/vit7b_pretrain.py"

# sbatch runs its script at once, and again as long as it asks to be requeued.
SBATCH = """#!/usr/bin/env bash
cat > "$FAKE/script"
export SLURM_JOB_ID=4711
while :; do
    rm -f "$FAKE/requeued"
    bash "$FAKE/script"
    STATUS=$?
    [[ -f $FAKE/requeued ]] || exit $STATUS
done
"""
# srun runs one task; the first one's job is near its limit after step 4. Like the real one it
# passes signals on.
SRUN = """#!/usr/bin/env bash
echo "$@" >> "$FAKE/steps"
while [[ $1 == --* ]]; do shift; done
export SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 SLURM_STEP_TASKS_PER_NODE=1 SLURM_STEP_ID=0
if (($(wc -l < "$FAKE/steps") == 1)); then
    (until [[ -f $FAKE/run/held_4 ]]; do sleep 0.05; done
        kill -USR1 $PPID) &
fi
"$@" &
TASK=$!
trap 'kill -USR1 $TASK' USR1
wait $TASK && STATUS=0 || STATUS=$?
while kill -0 $TASK 2> /dev/null; do
    wait $TASK && STATUS=0 || STATUS=$?
done
exit $STATUS
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$FAKE/scontrol"
touch "$FAKE/requeued"
"""


def submit(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(REPOSITORY / "tools/slurm_train.sh"), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )


def test_dry_run_prints_the_job():
    job = submit(
        *("gpu", "pretrain", CONFIG, "work dirs/7b", "--cfg-options", "a='b c'"),
        DRY_RUN="1",
        GPUS="256",
        SRUN_ARGS="--time=2-00:00:00 --account=lab",
    )
    assert job.returncode == 0, job.stderr
    options = {line[8:] for line in job.stdout.splitlines() if line.startswith("#SBATCH ")}
    assert options == {
        "--partition=gpu",
        "--job-name=pretrain",
        "--nodes=32",
        "--ntasks=256",
        "--ntasks-per-node=8",
        "--gres=gpu:8",
        "--cpus-per-task=5",
        '--output="work dirs/7b/slurm-%j.out"',
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@300",
        "--time=2-00:00:00",
        "--account=lab",
    }
    step = next(line for line in job.stdout.splitlines() if line.startswith("srun "))
    assert f"tools/train.py {CONFIG} --resume --work-dir work\\ dirs/7b --launcher slurm" in step
    assert subprocess.run(["bash", "-n"], input=job.stdout, text=True).returncode == 0
    # a checkpoint that the user names is not replaced by the newest
    job = submit("gpu", "p", CONFIG, "w", "--resume", "iter.pth", DRY_RUN="1")
    assert "--work-dir w --launcher slurm --resume iter.pth" in job.stdout
    assert job.stdout.count("--resume") == 1


def test_in_the_foreground():
    job = submit("gpu", "p", CONFIG, "w", DRY_RUN="1", SUBMIT="srun", GPUS="4")
    words = job.stdout.split()
    assert words[0] == "srun"
    assert {"--ntasks=4", "--ntasks-per-node=4", "--gres=gpu:4", "--nodes=1"} <= set(words)
    assert "--resume" in words


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("gpu", "job", CONFIG), {}, "usage"),
        (("gpu", "job", "no.py", "w"), {}, "there is no config no.py"),
        (("gpu", "job", CONFIG, "w"), {"GPUS": "12"}, "GPUS=12 is no multiple of GPUS_PER_NODE=8"),
        (("gpu", "job", CONFIG, "w"), {"SUBMIT": "qsub"}, "SUBMIT is sbatch or srun, not qsub"),
    ],
)
def test_mistakes(arguments, environment, message):
    job = submit(*arguments, **environment)
    assert job.returncode == 2
    assert message in job.stderr


@pytest.mark.slow
def test_a_job_near_its_limit_saves_and_is_requeued_to_the_end(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    cfg = toy_config(write_images(tmp_path / "images"), tmp_path / "run")
    cfg.train_cfg.max_iters = 12
    cfg.custom_imports = dict(imports=["tests.integration.kill_hook"])
    cfg.custom_hooks.append(dict(type="HoldHook", iteration=4))
    cfg.default_hooks.checkpoint.interval = 1000
    cfg.dump(tmp_path / "toy.py")
    job = submit(
        *("gpu", "toy", str(tmp_path / "toy.py"), str(tmp_path / "run")),
        GPUS="1",
        PATH=f"{programs}:{os.environ['PATH']}",
        FAKE=str(tmp_path),
        PYTHONPATH=str(REPOSITORY),
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"
    steps = (tmp_path / "steps").read_text().splitlines()
    assert len(steps) == 2
    assert steps[0] == steps[1]
    stopped, end = list_checkpoints(tmp_path / "run")
    assert 4 <= stopped < 12
    assert end == 12
    assert list(read_trace(tmp_path / "run")) == list(range(1, 13))
