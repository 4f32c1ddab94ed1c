"""``tools/train.py --resume`` of a pretraining run says what is different."""

import shutil

import pytest

from dinov3_mm.engine import ConfigError
from dinov3_mm.engine.training_state import read_training_state, write_training_state
from tests.integration.downstream_run import log_of
from tests.integration.toy_run import toy_config, train, write_images
from tests.integration.traces import read_trace


def config(images, work_dir, max_iters=3):
    """The toy run with schedules that follow the length of the run."""
    cfg = toy_config(images, work_dir, train_cfg__max_iters=max_iters)
    for hook in cfg.custom_hooks[:2]:
        for value in hook.values():
            if isinstance(value, dict):
                value.pop("total_iters", None)
    cfg.custom_hooks[1].teacher_temp.total_iters = 6
    return cfg


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def three(images, tmp_path_factory):
    """Work folder of three iterations of three."""
    folder = tmp_path_factory.mktemp("three")
    train(config(images, folder / "run"), folder)
    return folder / "run"


def resume(three, folder, cfg, *arguments):
    """Go on in a copy of the work folder; what was logged, and the trace."""
    if not (folder / "run").exists():
        shutil.copytree(three, folder / "run", ignore=shutil.ignore_patterns("2*"))
    train(cfg, folder, "--resume", *arguments)
    return log_of(folder / "run")


def test_a_longer_run_with_other_settings(images, three, tmp_path):
    cfg = config(images, tmp_path / "run", 4)
    cfg.train_cfg.global_batch_size = 8
    cfg.model.koleo = dict(weight=0.3)
    log = resume(three, tmp_path, cfg)
    assert "3 of 4 iterations are done" in log
    for difference in (
        "train_cfg.max_iters: 3 -> 4",
        "train_cfg.global_batch_size: 4 -> 8",
        'model.koleo: not set -> {"weight": 0.3}',
    ):
        assert f"resume: {difference}, the config counts" in log
    assert "OptimScheduleHook.lr) jumps at iteration 3 from 1e-06 to" in log
    assert "because of:" in log
    # the rate is that of a run of four
    straight = tmp_path / "straight"
    straight.mkdir()
    train(config(images, straight / "run", 4), straight)
    rates = [read_trace(folder / "run")[4]["lr"] for folder in (tmp_path, straight)]
    assert rates[0] == rates[1]


def test_images_added_and_renamed(images, three, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    log = resume(three, tmp_path, config(folder, tmp_path / "run", 4))
    assert "images:" not in log and "source.root" in log
    shutil.rmtree(tmp_path / "run")
    write_images(folder, count=25)
    log = resume(three, tmp_path, config(folder, tmp_path / "run", 4))
    assert "images: 24 -> 25" in log and "because of: train_cfg.max_iters, images" in log
    shutil.rmtree(tmp_path / "run")
    (folder / "024.png").unlink()
    (folder / "000.png").rename(folder / "9.png")
    log = resume(three, tmp_path, config(folder, tmp_path / "run", 4))
    assert "24 as before, but with other names" in log


def test_nothing_changed_and_complete(images, three, tmp_path):
    log = resume(three, tmp_path, config(images, tmp_path / "run"))
    assert "complete, 3 of 3 iterations" in log
    with pytest.raises(ConfigError, match=r"has done 3 iterations, and train_cfg\.max_iters is 2"):
        resume(three, tmp_path, config(images, tmp_path / "run", 2))


def test_an_interrupted_run_goes_on_as_if_it_were_not(images, tmp_path):
    cfg = config(images, tmp_path / "run", 4)
    cfg.default_hooks.checkpoint.interval = 2
    train(cfg, tmp_path)
    shutil.rmtree(next((tmp_path / "run").glob("2*")))
    (tmp_path / "run/checkpoints/iter_00000004.pth").unlink()
    log = resume(None, tmp_path, cfg)
    assert "2 of 4 iterations" in log
    assert "config, seed and data are the same" in log


def test_a_checkpoint_of_an_older_version(images, three, tmp_path):
    shutil.copytree(three, tmp_path / "run", ignore=shutil.ignore_patterns("2*"))
    path = tmp_path / "run/checkpoints/iter_00000003.pth"
    state = read_training_state(path)
    del state["meta"]["run"], state["format_version"]
    write_training_state(path, state)
    log = resume(three, tmp_path, config(images, tmp_path / "run", 4))
    assert "cannot be told" in log


def test_a_run_that_ended_before_its_first_checkpoint(images, tmp_path):
    cfg = toy_config(images, tmp_path / "run", train_cfg__max_iters=1)
    (tmp_path / "run").mkdir()
    assert "starts from the beginning" in resume(None, tmp_path, cfg)
    assert list(read_trace(tmp_path / "run")) == [1]
    shutil.rmtree(tmp_path / "run/checkpoints")
    cfg.model.backbone.init_cfg = dict(type="DINOv3Pretrained", checkpoint=None)
    with pytest.raises(ConfigError, match=r"no checkpoint yet(.|\n)*--weights FILE"):
        resume(None, tmp_path, cfg)
