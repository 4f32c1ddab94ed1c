"""Folders of images and label maps, and what is wrong in users' folders."""

import numpy as np
import pytest
from PIL import Image

from tests.hosts.lane import require_hosts

require_hosts()
from dinov3_mm.datasets.segmentation import SegmentationFolder  # noqa: E402


def save(path, mode):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 5, 3) if mode == "RGB" else (4, 5), np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nroad\n\ntree\n", encoding="utf-8")
    for name in ("b.JPG", "a/c.png", "unlabelled.jpg"):
        save(tmp_path / "images/train" / name, "RGB")
    for name in ("b.png", "a/c.png"):
        save(tmp_path / "labels/train" / name, "L")
    return tmp_path


def test_pairs(root):
    data = SegmentationFolder(str(root), "train")
    assert data.metainfo["classes"] == ("sky", "road", "tree") and len(data) == 2
    first, second = (data.get_data_info(i) for i in range(2))
    assert first["img_path"].endswith("images/train/a/c.png")
    assert second["img_path"].endswith("b.JPG") and second["seg_map_path"].endswith("b.png")
    assert len(data.metainfo["palette"]) == 3


def test_refusals(root):
    with pytest.raises(FileNotFoundError, match=r"images/val is no folder"):
        SegmentationFolder(str(root), "val")
    save(root / "labels/train/alone.png", "L")
    with pytest.raises(ValueError, match=r"1 label maps .* have no image, e\.g\. alone\.png"):
        SegmentationFolder(str(root), "train")
    save(root / "images/train/alone.jpg", "RGB")
    save(root / "images/train/alone.png", "RGB")
    with pytest.raises(ValueError, match="have the same name"):
        SegmentationFolder(str(root), "train")
    (root / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match="names of the classes, one a line"):
        SegmentationFolder(str(root), "train")


@pytest.mark.parametrize(
    "lines",
    [
        "sky 70 130 180\nroad 128 64 128\ntree, tall 0 128 0\n",
        "name,r,g,b\nsky,70,130,180\nroad,128,64,128\n'tree, tall',0,128,0\n",
        "# label:color_rgb:parts\nsky:70,130,180::\nroad:128,64,128::\ntree, tall:0,128,0::",
    ],
)
def test_colours_of_the_class_file(root, lines):
    (root / "classes.txt").write_text(lines.replace("'", ""), encoding="utf-8")
    data = SegmentationFolder(str(root), "train", palette="from_file", ignored_colors=[9])
    assert data.metainfo["classes"] == ("sky", "road", "tree, tall")
    assert data.metainfo["palette"] == [[70, 130, 180], [128, 64, 128], [0, 128, 0]]
    colors = {(70, 130, 180): 0, (128, 64, 128): 1, (0, 128, 0): 2, (9, 9, 9): 255}
    assert data.get_data_info(0)["label_colors"] == colors


def test_colours_that_are_not_there(root):
    with pytest.raises(ValueError, match=r"classes\.txt has no colour in 'sky'; expected lines"):
        SegmentationFolder(str(root), "train", palette="from_file")
    with pytest.raises(ValueError, match="palette is 'file'; expected a list of colours, or 'from"):
        SegmentationFolder(str(root), "train", palette="file")
    with pytest.raises(ValueError, match=r"palette has 2 colours, .*classes\.txt 3 classes"):
        SegmentationFolder(str(root), "train", palette=[0, 255])
    data = SegmentationFolder(str(root), "train", palette=[0, 9, [1, 2, 3]])
    assert data.metainfo["palette"] == [[0, 0, 0], [9, 9, 9], [1, 2, 3]]


def test_no_labels(root):
    for path in (root / "labels/train").rglob("*.png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no label maps"):
        SegmentationFolder(str(root), "train")
