"""A signal to ``tools/dist_train.sh``: all ranks stop in one step, after saving; and refusals."""

import signal
import time

import psutil
import pytest

from dinov3_mm.engine.run_files import list_checkpoints
from tests.acceptance.rank_parity import parity_config
from tests.integration.toy_run import start_training, write_images
from tests.integration.traces import read_trace


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "words"),
    [(signal.SIGTERM, 0, "a signal"), (signal.SIGINT, 130, "Ctrl-C")],
)
def test_two_ranks_save_and_end_normally(tmp_path, number, status, words):
    cfg = parity_config(write_images(tmp_path / "images"), tmp_path / "run", iters=10000)
    cfg.dump(tmp_path / "toy.py")
    run = start_training(tmp_path / "toy.py", ranks=2)
    while run.poll() is None and max(read_trace(tmp_path / "run"), default=0) < 12:
        time.sleep(0.05)
    run.send_signal(number)
    output, _ = run.communicate()
    assert run.returncode == status, output
    last = max(read_trace(tmp_path / "run"))
    assert last % 10 == 0
    assert list(list_checkpoints(tmp_path / "run")) == [last]
    assert f"stopped by {words} after iteration {last}" in output
    assert "Traceback" not in output and "torch" not in output


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path):
    cfg = parity_config(write_images(tmp_path / "images"), tmp_path / "run", iters=10000)
    cfg.default_hooks.checkpoint.interval = 10000
    # They come while the ranks are in a step that takes minutes.
    cfg.custom_imports = dict(imports=["tests.integration.fault_hook"])
    cfg.custom_hooks.append(dict(type="WaitHook", iteration=2))
    cfg.dump(tmp_path / "toy.py")
    run = start_training(tmp_path / "toy.py", ranks=2)
    while run.poll() is None and len(list((tmp_path / "run").glob("waiting_*"))) < 2:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 130, output
    assert "Ctrl-C: saving within 10 steps" in output
    assert list(list_checkpoints(tmp_path / "run")) == []
    assert "Traceback" not in output


@pytest.mark.slow
def test_ranks_that_refuse_leave_one_line(tmp_path):
    cfg = parity_config(tmp_path / "nowhere", tmp_path / "run", iters=2)
    cfg.dump(tmp_path / "toy.py")
    run = start_training(tmp_path / "toy.py", ranks=2)
    output, _ = run.communicate()
    assert run.returncode == 1
    lines = output.splitlines()
    assert len(lines) == 1, output
    assert lines[0].startswith(f"{tmp_path}/toy.py: ") and "nowhere" in lines[0]


@pytest.mark.slow
def test_a_killed_rank_is_named(tmp_path):
    cfg = parity_config(write_images(tmp_path / "images"), tmp_path / "run", iters=10000)
    cfg.dump(tmp_path / "toy.py")
    run = start_training(tmp_path / "toy.py", ranks=2)
    while run.poll() is None and max(read_trace(tmp_path / "run"), default=0) < 3:
        time.sleep(0.05)
    psutil.Process(run.pid).children()[0].kill()
    output, _ = run.communicate()
    assert run.returncode == 128 + signal.SIGKILL, output
    assert "was ended by SIGKILL: most often the machine ran out of memory" in output
    assert "Traceback" not in output
