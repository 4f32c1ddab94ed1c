"""What ``tools/train.py`` makes of its command line."""

import pytest
import torch

from dinov3_mm.commands.train import load_config, parse_args
from dinov3_mm.engine.training_state import write_training_state


@pytest.mark.parametrize("runner_type", ["FlexibleRunner", "Runner"])
def test_resume_goes_on_from_the_newest_checkpoint_of_the_runner(tmp_path, runner_type):
    config, work_dir = tmp_path / "cfg.py", tmp_path / "run"
    config.write_text(f"runner_type = {runner_type!r}\nload_from = 'weights.pth'\n")
    words = [str(config), "--resume", "--work-dir", str(work_dir)]
    cfg = load_config(parse_args(words))
    assert not cfg.get("resume")
    assert cfg.load_from == "weights.pth"
    (work_dir / "checkpoints").mkdir(parents=True)
    if runner_type == "FlexibleRunner":
        newest = work_dir / "checkpoints/iter_00000002.pth"
        write_training_state(newest, {"meta": {"iter": 2}})
        expected = (str(newest), None)
    else:
        newest = work_dir / "epoch_2.pth"
        torch.save({"meta": {"iter": 2}}, newest)
        (work_dir / "last_checkpoint").write_text("/elsewhere/epoch_2.pth")
        expected = (True, str(newest))
    cfg = load_config(parse_args(words))
    assert (cfg.resume, cfg.load_from) == expected
