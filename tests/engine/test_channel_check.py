"""Source, statistics and backbone must agree before the first iteration."""

import numpy as np
import pytest
import tifffile

from dinov3_mm.checkpoints import read_metadata
from dinov3_mm.evaluation.records import read_records
from tests.integration.toy_run import toy_config, train
from tests.integration.traces import read_trace


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Sixteen 16-bit TIFF files of five bands."""
    folder = tmp_path_factory.mktemp("bands")
    rng = np.random.default_rng(0)
    for index in range(16):
        coarse = rng.integers(0, 65536, (5, 6, 6))
        pixels = np.kron(coarse, np.ones((8, 8))).astype(np.uint16)
        tifffile.imwrite(folder / f"{index}.tif", pixels, photometric="minisblack")
    return folder


def configure(images, work_dir, in_channels, values, **source):
    cfg = toy_config(images, work_dir, train_cfg__max_iters=2)
    cfg.train_dataloader.source.update(color="unchanged", **source)
    cfg.model.backbone.in_channels = in_channels
    cfg.model.data_preprocessor.update(mean=[0.5] * values, std=[0.29] * values)
    return cfg


@pytest.mark.parametrize(
    ("in_channels", "values", "source", "numbers"),
    [
        (3, 3, {}, "5 in the images of ImageFolder, 3 in mean and std .*, 3 in in_channels"),
        (5, 3, {}, "5 in the images of ImageFolder, 3 in mean and std .*, 5 in in_channels"),
        (3, 5, {}, "5 in the images of ImageFolder, 5 in mean and std .*, 3 in in_channels"),
        (5, 5, {"channels": [4, 0]}, "2 in the images .*, 5 in mean and std .*, 5 in in_channels"),
    ],
)
def test_the_three_numbers_are_named(images, tmp_path, in_channels, values, source, numbers):
    cfg = configure(images, tmp_path / "run", in_channels, values, **source)
    with pytest.raises(ValueError, match=f"channels disagree: {numbers}.* set model.backbone"):
        train(cfg, tmp_path)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_run_on_five_bands(images, tmp_path):
    cfg = configure(images, tmp_path / "run", 5, 5)
    source = dict(cfg.train_dataloader.source)
    hook = dict(type="RetrievalEvalHook", interval=2, source=source, image_size=32)
    cfg.custom_hooks = [*cfg.custom_hooks, hook]
    train(cfg, tmp_path)
    trace = read_trace(tmp_path / "run")
    assert all(np.isfinite(trace[step]["loss"]) for step in (1, 2))
    header = read_metadata(tmp_path / "run/exports/teacher_latest.safetensors")
    assert header["arch"]["in_channels"] == 5
    assert header["statistics"] == {"mean": [0.5] * 5, "std": [0.29] * 5}
    records = read_records(tmp_path / "run/evaluations.jsonl")
    assert [record["step"] for record in records] == [0, 2]


def test_channels_can_be_dropped(images, tmp_path):
    cfg = configure(images, tmp_path / "run", 3, 3, channels=[4, 2, 0])
    cfg.train_dataloader.transform.channel_drop_prob = 0.5
    train(cfg, tmp_path)
    assert len(read_trace(tmp_path / "run")) == 2
