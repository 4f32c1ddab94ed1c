"""Two gloo ranks train the same model as one process (``tests/acceptance/rank_parity.py``)."""

import shutil

import pytest

from dinov3_mm.engine.run_files import checkpoint_path
from tests.acceptance.rank_parity import compare, train_alone, train_ranks
from tests.integration.toy_run import write_images

ITERS = 20


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    """Work folder of the run of one process."""
    return train_alone(tmp_path_factory.mktemp("alone"), images, ITERS)


@pytest.mark.slow
def test_two_ranks_equal_one_process(images, alone, tmp_path):
    difference = compare(alone, train_ranks(tmp_path, images, ITERS, 2), ITERS)
    assert difference.is_within_bars, str(difference)


@pytest.mark.slow
def test_two_ranks_resume_what_one_process_began(images, alone, tmp_path):
    half = str(ITERS // 2)
    began = train_alone(
        tmp_path,
        images,
        ITERS,
        "--cfg-options",
        f"train_cfg.max_iters={half}",
        f"default_hooks.checkpoint.interval={half}",
    )
    checkpoint = checkpoint_path(began, ITERS // 2)
    work_dir = train_ranks(tmp_path, images, ITERS, 2, "--resume", str(checkpoint))
    shutil.copytree(began, work_dir, dirs_exist_ok=True)
    difference = compare(alone, work_dir, ITERS)
    assert difference.is_within_bars, str(difference)
