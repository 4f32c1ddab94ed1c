"""The held-out split: stable, disjoint, the same everywhere."""

import os
import subprocess
import sys

import pytest

from dinov3_mm.datasets import ImageFolder
from dinov3_mm.evaluation import HeldOutSplit
from tests.evaluation.toys import UnlabelledSquares
from tests.integration.continue_run import labelled_noise
from tests.integration.toy_run import write_images


def names(split):
    return {os.path.relpath(split.path(i), split.source.root) for i in range(len(split))}


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", count=60, size=8)


def test_parts_are_disjoint_and_complete(folder):
    source = ImageFolder(str(folder))
    train, test = (HeldOutSplit(source, part, 5) for part in ("train", "test"))
    assert len(train) + len(test) == 60
    assert not names(train) & names(test)
    assert 4 <= len(test) <= 22  # 12 on average


def test_an_image_keeps_its_side_when_the_folder_moves_and_grows(folder, tmp_path):
    before = names(HeldOutSplit(ImageFolder(str(folder)), "test", 5))
    moved = tmp_path / "elsewhere" / "photos"
    moved.parent.mkdir()
    folder.rename(moved)
    write_images(moved / "more", count=60, size=8)
    after = names(HeldOutSplit(dict(type="ImageFolder", root=f"{moved}/"), "test", 5))
    assert {name for name in after if "more" not in name} == before


def test_other_processes_agree(folder):
    code = (
        "from dinov3_mm.datasets import ImageFolder; from dinov3_mm.evaluation import HeldOutSplit;"
        f"print(HeldOutSplit(ImageFolder({str(folder)!r}), 'test', 5).indices.tolist())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    own = HeldOutSplit(ImageFolder(str(folder)), "test", 5).indices.tolist()
    assert answer.splitlines()[-1] == str(own)


def test_labels_and_headers_are_those_of_the_source(tmp_path):
    source = ImageFolder(str(labelled_noise(tmp_path / "photos")))
    split = HeldOutSplit(source, "test", 3)
    assert split.classes == ("class0", "class1", "class2")
    for index in range(len(split)):
        assert f"class{split.label(index)}" in split.path(index)
        assert split.load_image(index).shape[:2] == split.probe(index)[:2]


def test_what_cannot_be_split_is_refused(folder):
    source = ImageFolder(str(folder))
    with pytest.raises(ValueError, match="part must be one of"):
        HeldOutSplit(source, "val", 5)
    with pytest.raises(ValueError, match="every must be an integer >= 2"):
        HeldOutSplit(source, "train", 1)
    with pytest.raises(ValueError, match="the test part of 60 image"):
        HeldOutSplit(source, "test", 10**9)
    assert not hasattr(UnlabelledSquares(4), "probe")
