"""The quick part of ``channels.py``: the same way with a few iterations."""

import numpy as np
import pytest

from dinov3_mm.datasets import ImageFolder, channel_statistics
from tests.acceptance.channels import CONFIG, check_export, train, write_images
from tools.compute_statistics import main as compute_statistics


@pytest.mark.parametrize(
    ("channels", "dtype", "layout"), [(8, "uint16", "planar"), (1, "uint8", "gray")]
)
def test_from_files_to_features(tmp_path, channels, dtype, layout):
    images = write_images(tmp_path / "images", channels, dtype, layout, count=16)
    losses = train(images, tmp_path / "run", 3, batch_size=8)
    assert len(set(losses)) == 3
    assert check_export(images, tmp_path / "run", channels).shape == (16, 96)


def test_types_show_the_same_images(tmp_path):
    """A scene stored in 8 bits, 16 bits and float is one image up to rounding."""
    stored = {}
    for dtype in ("uint8", "uint16", "float32"):
        folder = write_images(tmp_path / dtype, 4, dtype, "interleaved", count=2)
        stored[dtype] = ImageFolder(str(folder), color="unchanged").load_image(1)
    assert np.abs(stored["uint16"] - stored["float32"]).max() < 255 / 65535 + 1e-4
    assert np.abs(stored["uint8"] - stored["float32"]).max() < 1 + 1e-4


def test_the_statistics_tool_prints_config_lines(tmp_path, capsys):
    images = write_images(tmp_path / "images", 8, "uint16", "pages", count=6)
    options = {"channels": [7, 0], "value_range": (0, 40000)}
    expected = channel_statistics(ImageFolder(str(images), color="unchanged", **options))
    compute_statistics([str(images), "--channels", "7", "0", "--value-range", "0", "40000"])
    folder = capsys.readouterr().out
    title, lines = folder.split("\n", 1)
    assert title == "# 2 channels, 6 of 6 images" and lines.strip() == expected.config_lines()
    words = [f"train_dataloader.source.{key}={value}" for key, value in options.items()]
    words.append(f"train_dataloader.source.root={images}")
    compute_statistics([str(CONFIG), "--cfg-options", *words])
    assert capsys.readouterr().out == folder
    with pytest.raises(ValueError, match="belong to a folder"):
        compute_statistics([str(CONFIG), "--channels", "1"])
