"""The first screen of a run: what matters on the console, everything in the files."""

import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from mmengine.runner import Runner

from dinov3_mm.engine.console import lines_of_a_test, quiet_console
from tests.integration.downstream_run import downstream_config
from tests.integration.downstream_run import train as train_downstream
from tests.integration.toy_run import toy_config, train, write_images

WORDS = ["job", "data", "weights", "model", "length", "device", "results", "to stop"]


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


def messages(printed: str) -> list[str]:
    """What the lines of a console say, without time and level."""
    return [line.split(" - ", 3)[-1] for line in printed.splitlines()]


def first_screen(printed: str) -> dict[str, str]:
    """What is said before the first iteration, by the word in front."""
    said = messages(printed)
    return {word: next(text for text in said if text.startswith(word)) for word in WORDS}


def test_a_pretraining_begins_with_what_matters(images, tmp_path, capsys):
    cfg = toy_config(images, tmp_path / "run", train_cfg__max_iters=2)
    train(cfg, tmp_path)
    printed = capsys.readouterr().out
    said = first_screen(printed)
    assert "pretraining (DINOv3)" in said["job"] and str(tmp_path / "toy.py") in said["job"]
    assert f"24 images to train on: ImageFolder in {images}" in said["data"]
    assert "random" in said["weights"]
    assert "2 iterations of 4 images" in said["length"]
    assert "1 process on CPU, computing in fp32" in said["device"]
    assert str(tmp_path / "run") in said["results"] and "--resume" in said["to stop"]
    before = messages(printed)
    before = before[: next(i for i, text in enumerate(before) if text.startswith("diagnosis"))]
    assert len(before) <= 12
    assert not any(text.startswith((" ", "Config:", "Hooks will", "---")) for text in before)


def test_the_files_hold_the_rest(images, tmp_path):
    train(toy_config(images, tmp_path / "run", train_cfg__max_iters=1), tmp_path)
    log = next((tmp_path / "run").glob("*/*.log")).read_text()
    for page in ("System environment:", "Config:\n", "Hooks will be executed"):
        assert log.count(page) == 1
    environment = (tmp_path / "run" / "environment.txt").read_text()
    assert environment.startswith("System environment:") and "PyTorch: " in environment
    assert "MultiCrop" in (tmp_path / "run" / "toy.py").read_text()


def test_a_downstream_run_begins_alike(tmp_path, capsys):
    cfg = downstream_config(tmp_path / "run", by_epoch=True, train_cfg__max_epochs=2)
    train_downstream(cfg, tmp_path)
    printed = capsys.readouterr().out
    said = first_screen(printed)
    assert "16 images to train on: ToyPoints" in said["data"]
    assert "10 parameters" in said["model"]
    assert "2 epochs of 8 iterations of 2 images" in said["length"]
    assert "Config:" not in printed and "SyncBatchNorm" not in printed
    assert "SyncBatchNorm" in next((tmp_path / "run").glob("*/*.log")).read_text()
    train_downstream(cfg, tmp_path, "--resume", "--cfg-options", "train_cfg.max_epochs=3")
    said = first_screen(capsys.readouterr().out)
    assert f"goes on with {tmp_path}/run/epoch_2.pth" in said["weights"]
    assert "16 iterations are done" in said["length"]


def test_only_what_is_named_is_kept_from_the_console(tmp_path, capsys):
    with pytest.warns(UserWarning, match="of somebody"), quiet_console(str(tmp_path)):
        logger = MMLogger.get_instance("quiet", log_file=str(tmp_path / "run.log"))
        warnings.warn("of somebody", stacklevel=1)
        warnings.warn("Setting MKL_NUM_THREADS environment variable to 1", stacklevel=1)
    logger.warning('"FileClient" will be deprecated in future. Please use io functions')
    logger.warning("the config says that FileClient is not used")
    printed = capsys.readouterr()
    assert "will be deprecated" not in printed.out and "the config says" in printed.out
    assert "MKL_NUM_THREADS" not in printed.out + printed.err
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.close()
    kept = Path(tmp_path / "run.log").read_text()
    assert "MKL_NUM_THREADS" in kept and "will be deprecated" in kept and "the config says" in kept


def test_a_test_begins_with_what_is_tested(tmp_path):
    cfg = downstream_config(tmp_path / "run")
    data = dict(type="ToyPoints", length=6)
    loader = dict(batch_size=2, num_workers=0, sampler=dict(type="DefaultSampler"), dataset=data)
    runner = SimpleNamespace(
        model=MODELS.build(cfg.model),
        test_loop=SimpleNamespace(dataloader=Runner.build_dataloader(loader)),
        work_dir=str(tmp_path / "run"),
        log_dir=str(tmp_path / "run" / "now"),
    )
    said = dict(lines_of_a_test(runner, cfg, "epoch_3.pth"))
    assert said["data"] == "6 images to test on: ToyPoints"
    assert said["weights"] == "from epoch_3.pth"
    assert said["results"] == f"{tmp_path}/run: metrics.json, log in now/"
