"""A bad step of two FSDP2 ranks is captured by both, and runs again in one process."""

import pytest

from dinov3_mm.engine.capture import replay_capture
from tests.acceptance.rank_parity import parity_config
from tests.integration.toy_run import start_training, write_images
from tools import replay_capture as replay_tool


@pytest.mark.slow
def test_one_bad_rank_of_two(tmp_path, capsys):
    cfg = parity_config(write_images(tmp_path / "images"), tmp_path / "run", iters=4)
    cfg.strategy = dict(type="FSDP2Strategy")
    cfg.custom_imports = dict(imports=["tests.integration.fault_hook"])
    poison = dict(type="PoisonHook", iteration=2, rank=1)
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type="NonFiniteGuardHook"), poison]
    cfg.dump(tmp_path / "toy.py")
    output, _ = (run := start_training(tmp_path / "toy.py", ranks=2)).communicate()
    assert run.returncode == 0, output
    folder = tmp_path / "run" / "captures" / "iter_00000002"
    assert "iteration 2: non-finite loss on rank(s) [1]; the step was skipped" in output
    assert f"Captured in {folder}: run it again" in output

    replay_tool.main([str(tmp_path / "toy.py"), str(folder)])
    text = capsys.readouterr().out
    assert "iteration 2, rank 1" in text and "rank 0" not in text
    assert "output that is not finite: data_preprocessor" in text
    assert "the step is not finite" in text
    assert replay_capture(folder, cfg, rank=0).is_finite
