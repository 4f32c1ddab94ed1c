"""``tools/gpu_check.sh``: the plan, items that fail or hang, and two items on the CPU."""

import argparse
import json
import subprocess
import sys

import pytest

from tests.gpu_check.items import ITEMS, fits_of
from tests.integration.toy_run import REPOSITORY
from tools import gpu_check


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(REPOSITORY / "tools/gpu_check.sh"), *arguments],
        capture_output=True,
        text=True,
        env={**gpu_check.environment(), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
    )


def test_the_plan_of_a_machine_without_a_gpu():
    plan = run("--plan")
    assert plan.returncode == 0, plan.stderr
    assert "sees no CUDA device" in plan.stdout
    for name, item in ITEMS.items():
        assert f"\n{name}: about {item.estimate} s, {item.budget} s at most" in plan.stdout
    total = fits_of(list(ITEMS), gpu_check.MOST_JOBS)
    assert total <= 60 * 8, "the items of the default run do not fit its time"


def test_without_a_gpu_it_says_what_to_do():
    refused = run()
    assert refused.returncode == 2
    assert "sees no CUDA device; set PYTHON to an interpreter whose torch does" in refused.stderr


def test_an_item_on_the_cpu_and_one_that_needs_cuda(tmp_path):
    rehearsal = run("--device", "cpu", "--only", "knn", "cuda-graphs", "--out", str(tmp_path))
    assert rehearsal.returncode == 0, rehearsal.stdout + rehearsal.stderr
    (file,) = tmp_path.glob("gpu_check_cpu_*.json")
    report = json.loads(file.read_text())
    assert {item["item"]: item["status"] for item in report["items"]} == {
        "cuda-graphs": "skipped",
        "knn": "passed",
    }
    graphs, neighbours = report["items"]
    assert graphs["reason"] == "needs cuda"
    assert all(figure["holds"] in (True, None) for figure in neighbours["figures"])
    table = file.with_suffix(".md").read_text()
    assert "| cuda-graphs | skipped |" in table and "similarities against the CPU" in table


PARTIAL = """
import json, pathlib, sys, time
figure = dict(name="half of it", value=1.0, unit="", bound="<= 2", holds=True)
record = dict(status="running", reason="", figures=[figure], skipped=[])
pathlib.Path(sys.argv[1]).write_text(json.dumps(record))
{then}
"""


@pytest.mark.parametrize(
    "then, reason",
    [
        ("time.sleep(600)", "stopped after 1 s; last figure: half of it"),
        ("import os; os.kill(os.getpid(), 11)", "ended with -11: no message"),
        ("raise MemoryError('too large')", "ended with 1: MemoryError: too large"),
    ],
)
def test_an_item_that_hangs_or_dies_is_a_row(then, reason, tmp_path, monkeypatch):
    def command_of(name, device, out):
        return [sys.executable, "-c", PARTIAL.format(then=then), str(out)]

    monkeypatch.setattr(gpu_check, "command_of", command_of)
    monkeypatch.setattr(gpu_check, "LEAST", 0)
    minutes = 1 / 60 if "sleep" in then else 1
    args = argparse.Namespace(device="cpu", names=["parity-fp32", "knn"], jobs=1)
    clock, seen = gpu_check.Clock(minutes), []
    records = gpu_check.run_all(args, clock, tmp_path, seen.append)
    assert records[0]["status"] == "failed" and records[0]["reason"] == reason
    assert records[0]["figures"][0]["name"] == "half of it"
    # What comes after it runs, or is named.
    expected = ("not reached", "0 s left") if "sleep" in then else ("failed", reason)
    assert (records[1]["status"], records[1]["reason"]) == expected
    assert [len(each) for each in seen] == [1, 2]
