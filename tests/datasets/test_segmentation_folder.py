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


def test_no_labels(root):
    for path in (root / "labels/train").rglob("*.png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no label maps"):
        SegmentationFolder(str(root), "train")
