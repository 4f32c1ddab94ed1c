"""Label maps and boxes that follow the classes of a checkpoint; folders that are named anew."""

import numpy as np
import pytest
from mmengine.dataset import BaseDataset
from PIL import Image

from dinov3_mm.datasets import ClassificationFolder
from dinov3_mm.datasets.class_names import ClassNameError, follow_classes, map_classes
from dinov3_mm.datasets.transforms.host_steps import LoadLabelMap
from tests.acceptance.class_names import AS_THEY_ARE, paint

STORED = ("sky", "road", "tree")
PLACES = dict(owner="the checkpoint", where="the test set")


class Maps(BaseDataset):
    """A label map a sample, as mmseg's data sets describe it."""

    def __init__(self, path, classes, *, label_map=None, reduce=False, steps=(LoadLabelMap,)):
        self.path, self.label_map, self.reduce = str(path), label_map, reduce
        palette = [[10 * n] * 3 for n in range(len(classes))]
        super().__init__(
            metainfo=dict(classes=classes, palette=palette), pipeline=[step() for step in steps]
        )

    def load_data_list(self):
        info = dict(img_path="a.png", seg_map_path=self.path, label_map=self.label_map)
        return [dict(info, reduce_zero_label=self.reduce, seg_fields=[])]


class Boxes(BaseDataset):
    """A box of each class in one image."""

    def load_data_list(self):
        boxes = [
            dict(bbox=[0, 0, 9, 9], bbox_label=n) for n in range(len(self.metainfo["classes"]))
        ]
        return [dict(img_path="a.png", instances=boxes)]


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.png"
    Image.fromarray(np.array([[0, 1, 2], [3, 4, 255]], np.uint8)).save(path)
    return path


def test_label_maps_follow_by_name(labels):
    data = Maps(labels, ("road", "car", "sky", "tree", "dog"))
    lines = follow_classes(data, STORED, **PLACES)
    assert data[0]["gt_seg_map"].tolist() == [[1, 255, 0], [2, 255, 255]]
    assert data.metainfo["classes"] == STORED
    assert data.metainfo["palette"] == [[20] * 3, [0] * 3, [30] * 3]
    assert any("objects or pixels of 'car', 'dog' are left out" in line for line in lines)


def test_label_maps_that_are_mapped_or_shifted_already(labels):
    # Stored labels 1 to 4, of which the data set itself joins 3 and 4 into one class.
    data = Maps(labels, ("road", "sky", "tree"), label_map={0: 0, 1: 1, 2: 2, 3: 2}, reduce=True)
    follow_classes(data, STORED, **PLACES, palette=[[1, 2, 3]] * 3)
    assert data[0]["gt_seg_map"].tolist() == [[255, 1, 0], [2, 2, 255]]
    assert data.metainfo["palette"] == [[1, 2, 3]] * 3
    other = Maps(labels, ("road", "sky", "tree"), reduce=True, steps=())
    with pytest.raises(ClassNameError, match="only where LoadLabelMap reads the label maps"):
        follow_classes(other, STORED, **PLACES)


def test_names_that_nearly_agree_are_refused_where_others_are_left_out(labels):
    with pytest.raises(ClassNameError, match=r"has 'Sky' \(nearest 'sky'\); the checkpoint has no"):
        follow_classes(Maps(labels, ("road", "Sky", "car")), STORED, **PLACES)
    with pytest.raises(ClassNameError, match="has 'a', 'b'; the checkpoint has no such class"):
        follow_classes(Maps(labels, ("a", "b")), STORED, **PLACES)


def test_boxes_follow_by_name():
    data = Boxes(metainfo=dict(classes=("tree", "car", "sky")))
    follow_classes(data, STORED, **PLACES)
    assert [box["bbox_label"] for box in data[0]["instances"]] == [2, 0]


def test_nothing_changes_where_names_and_order_agree():
    data = Boxes(metainfo=dict(classes=STORED))
    assert follow_classes(data, STORED, **PLACES) == []
    assert map_classes(STORED, STORED, **PLACES) == ([0, 1, 2], [])


def folder(root, **metainfo):
    return ClassificationFolder(str(root), metainfo=metainfo or None)


def labels_by_folder(data):
    return {entry["img_path"].split("/")[-2]: entry["gt_label"] for entry in data}


def test_names_of_a_config_are_matched_with_folders(tmp_path):
    paint(tmp_path, {**AS_THEY_ARE, "ant": None})
    order = ("dog", "cat", "bee", "ant", "elk")
    assert labels_by_folder(folder(tmp_path, classes=order)) == {"bee": 2, "cat": 1, "dog": 0}
    with pytest.raises(ClassNameError, match=r"'bee' \(6 images\); metainfo\.classes has no such"):
        folder(tmp_path, classes=("ant", "cat", "dog"))
    with pytest.raises(ValueError, match="is the text 'ant'; expected a list of names"):
        folder(tmp_path, classes="ant")


def test_folders_are_renamed_in_their_order_where_no_name_agrees(tmp_path):
    paint(tmp_path, AS_THEY_ARE)
    new = ("Formica", "Apis", "Felis", "Canis")
    data = folder(tmp_path, classes=new)
    assert data.metainfo["classes"] == new
    assert labels_by_folder(data) == {"ant": 0, "bee": 1, "cat": 2, "dog": 3}
    with pytest.raises(ClassNameError, match=r"nearest 'Dog'"):  # other case, other order
        folder(tmp_path, classes=("Dog", "Cat", "Bee", "Ant"))


def test_folders_inside_class_folders_are_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        "dinov3_mm.datasets.labelled.print_log", lambda line, **_: said.append(line)
    )
    for name in ("pets", "plants"):
        paint(tmp_path / name, {"images": "ant"})
    assert folder(tmp_path).metainfo["classes"] == ("pets", "plants") and not said
    paint(tmp_path / "pets", {"cats": "cat"})
    assert len(folder(tmp_path)) == 18
    assert "pets/images and pets/cats are both 'pets'" in said[0].replace(
        "pets/cats and pets/images", "pets/images and pets/cats"
    )
