"""What ``tools/train.py`` makes of its command line."""

import pytest

from tools.train import load_config, parse_args


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
        expected = (str(newest), None)
    else:
        newest = work_dir / "epoch_2.pth"
        (work_dir / "last_checkpoint").write_text(str(newest))
        expected = (True, str(newest))
    newest.touch()
    cfg = load_config(parse_args(words))
    assert (cfg.resume, cfg.load_from) == expected
