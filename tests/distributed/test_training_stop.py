"""A scheduler's signal to ``tools/dist_train.sh``: all ranks stop in one step, after saving."""

import signal
import time

import pytest

from dinov3_mm.engine.runner.files import list_checkpoints
from tests.acceptance.rank_parity import parity_config
from tests.integration.toy_run import start_training, write_images
from tests.integration.traces import read_trace


@pytest.mark.slow
def test_two_ranks_save_and_end_normally(tmp_path):
    cfg = parity_config(write_images(tmp_path / "images"), tmp_path / "run", iters=10000)
    cfg.dump(tmp_path / "toy.py")
    run = start_training(tmp_path / "toy.py", ranks=2)
    while run.poll() is None and max(read_trace(tmp_path / "run"), default=0) < 12:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate()
    assert run.returncode == 0, output
    last = max(read_trace(tmp_path / "run"))
    assert last % 10 == 0
    assert list(list_checkpoints(tmp_path / "run")) == [last]
    assert f"stopped by a signal after iteration {last}" in output
