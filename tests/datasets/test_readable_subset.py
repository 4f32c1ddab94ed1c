"""ReadableSubset: an even sample without the files that cannot be read."""

import numpy as np
import pytest
from mmengine.registry import DATASETS
from PIL import Image

from dinov3_mm.datasets import ReadableSubset


@pytest.fixture
def folder(tmp_path):
    for number in range(10):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "4.png").write_bytes(b"not an image")
    return dict(type="ImageFolder", root=str(tmp_path))


def test_broken_files_are_left_out(folder):
    subset = DATASETS.build(dict(type="ReadableSubset", source=folder))
    assert isinstance(subset, ReadableSubset) and len(subset) == 9
    values = [int(subset.load_image(i)[0, 0, 0]) for i in range(9)]
    assert values == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert subset.path(4).endswith("5.png")


def test_sample_is_spread_evenly(folder):
    subset = ReadableSubset(folder, length=4)
    assert [int(subset.load_image(i)[0, 0, 0]) for i in range(4)] == [0, 3, 6, 9]


def test_errors(folder, tmp_path):
    with pytest.raises(ValueError, match="length >= 1"):
        ReadableSubset(folder, length=0)
    for number in range(1, 10):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="two readable images, 1 of 10"):
        ReadableSubset(folder)
