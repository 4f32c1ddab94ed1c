"""A run that is killed with SIGKILL, in a step and inside a checkpoint write, loses nothing.

``tests/acceptance/kill_resume.py`` is the longer version with five kills.
"""

import signal
import time

import pytest

from dinov3_mm.engine.run_files import list_checkpoints
from tests.integration.toy_run import start_training, toy_config, train, write_images
from tests.integration.traces import different_tensors, read_trace


@pytest.mark.slow
def test_killed_twice(tmp_path):
    images = write_images(tmp_path / "images")
    cfg = toy_config(images, tmp_path / "killed", train_dataloader__num_workers=2)
    cfg.custom_imports = dict(imports=["tests.integration.kill_hook"])
    kills = [dict(type="KillWhileSavingHook", iteration=6), dict(type="HoldHook", iteration=8)]
    cfg.custom_hooks = [*cfg.custom_hooks, *kills]
    config = tmp_path / "killed.py"
    cfg.dump(config)

    run = start_training(config)
    output, _ = run.communicate()
    assert run.returncode == -signal.SIGKILL, output
    assert list(list_checkpoints(tmp_path / "killed")) == [3]
    assert list((tmp_path / "killed" / "checkpoints").glob(".*.partial"))

    run = start_training(config, "--resume")
    kill_when_there(run, tmp_path / "killed" / "held_8")
    assert 8 in read_trace(tmp_path / "killed")
    assert list(list_checkpoints(tmp_path / "killed"))[:2] == [3, 6]
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*.partial"))

    train(cfg, tmp_path, "--resume")
    train(toy_config(images, tmp_path / "straight"), tmp_path)
    assert read_trace(tmp_path / "killed") == read_trace(tmp_path / "straight")
    assert different_tensors(tmp_path / "killed", tmp_path / "straight", 12) == []


def kill_when_there(run, flag) -> None:
    """SIGKILL as soon as the file ``flag`` is there."""
    while run.poll() is None and not flag.exists():
        time.sleep(0.01)
    run.kill()
    run.communicate()
    assert run.returncode == -signal.SIGKILL
