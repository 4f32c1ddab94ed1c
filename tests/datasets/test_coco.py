"""Annotation files of objects: what is read, what is left out, what is refused."""

import json

import pytest

from dinov3_mm.datasets.coco import AnnotationError, check_classes, compare_names, read_coco


def content(**changes) -> dict:
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}],
        "annotations": [
            {"id": 5, "image_id": 1, "category_id": 7, "bbox": [10, 10, 20, 30], "area": 400},
            {"id": 6, "image_id": 1, "category_id": 12, "bbox": [0, 0, 10, 10], "area": 100},
        ],
        "categories": [
            {"id": 7, "name": "apple"},
            {"id": 300, "name": "pear"},
            {"id": 12, "name": "plum"},
        ],
        **changes,
    }


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        path = tmp_path / "train.json"
        path.write_text(json.dumps(content(**changes)))
        return path

    return write


def annotation(**changes) -> dict:
    entry = {**content()["annotations"][0], **changes}
    return {key: value for key, value in entry.items() if value is not None}


def test_names_follow_ascending_ids(write):
    file = read_coco(write())
    assert file.names == ("apple", "plum", "pear")
    assert file.counts() == {"apple": 1, "plum": 1}
    assert file.remarks() == []


def test_content_in_the_order_of_the_classes(write):
    ordered = read_coco(write()).in_order_of(("pear", "plum", "apple"))
    assert [c["name"] for c in ordered["categories"]] == ["pear", "plum", "apple"]
    assert [c["id"] for c in ordered["categories"]] == [1, 2, 3]
    assert [a["category_id"] for a in ordered["annotations"]] == [3, 2]


def test_other_categories_are_dropped_and_missing_ones_are_empty(write):
    ordered = read_coco(write()).in_order_of(("plum", "cherry"))
    assert [(a["id"], a["category_id"]) for a in ordered["annotations"]] == [(6, 1)]
    assert [c["name"] for c in ordered["categories"]] == ["plum", "cherry"]


def test_ids_as_text(write):
    file = read_coco(
        write(
            images=[{**content()["images"][0], "id": "1"}],
            annotations=[annotation(id="5", image_id="1", category_id="7")],
            categories=[{"id": "7", "name": "apple"}],
        )
    )
    assert file.annotations[0]["image_id"] == 1
    assert file.categories == {7: "apple"}


def test_missing_area_and_crowd_flag(write):
    file = read_coco(write(annotations=[annotation(area=None)]))
    assert file.annotations[0]["area"] == 600
    assert file.annotations[0]["iscrowd"] == 0


def test_boxes_that_cannot_be_found_are_left_out(write):
    boxes = ([10, 10, 0, 5], [10, 10, 5, -2], [100, 10, 5, 5], [-9, 0, 5, 5], [-3, -3, 5, 5])
    file = read_coco(write(annotations=[annotation(id=i, bbox=b) for i, b in enumerate(boxes)]))
    assert [each["id"] for each in file.annotations] == [4]
    flat, outside = file.remarks()
    assert "2 of 5 boxes left out, without an area (annotations 0, 1)" in flat
    assert "outside their image (annotations 2, 3)" in outside


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [annotation(bbox=None)]}, "annotation 5: bbox is missing"),
        ({"annotations": [annotation(bbox=[1, 2, 3])]}, r"annotation 5: bbox is \[1, 2, 3\]"),
        ({"annotations": [annotation(bbox=["1", 2, 3, 4])]}, "annotation 5: bbox"),
        ({"annotations": [annotation(image_id=9)]}, "annotation 5.*no image with id 9"),
        ({"annotations": [annotation(category_id=9)]}, "annotation 5.*no category with id 9"),
        ({"annotations": [annotation(id="x")]}, "annotation 'x': id is 'x'"),
        ({"annotations": [annotation(), annotation()]}, "several annotations.*5"),
        ({"images": []}, "lists no images"),
        ({"images": [{"id": 1, "file_name": "a.jpg", "width": 9}]}, "a.jpg.*height is missing"),
        ({"categories": []}, "no categories"),
        ({"categories": [{"id": 7, "name": "a"}, {"id": 7, "name": "b"}]}, "have one id"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, "2 times"),
        ({"annotations": {}}, "no COCO file of objects"),
    ],
)
def test_files_that_are_refused(write, changes, message):
    with pytest.raises(AnnotationError, match=message) as caught:
        read_coco(write(**changes))
    assert "train.json" in str(caught.value)


def test_no_json(tmp_path):
    with pytest.raises(AnnotationError, match="there is no annotation file"):
        read_coco(tmp_path / "absent.json")
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(AnnotationError, match=r"broken\.json is no readable JSON"):
        read_coco(path)


@pytest.mark.parametrize(
    ("classes", "message"),
    [("apple", "the text 'apple'"), (("a", "a"), "'a' twice"), ((), "is empty")],
)
def test_classes_that_are_no_names(classes, message):
    with pytest.raises(AnnotationError, match=message):
        check_classes(classes, "metainfo.classes")


def test_names_that_are_likely_the_same_are_refused(write):
    file = read_coco(write())
    for wrong in ("aple", "Apple", "apple "):
        with pytest.raises(AnnotationError, match=f"'{wrong}' and 'apple'"):
            compare_names((wrong, "pear", "plum"), file, is_training=False)


def test_a_class_that_the_training_file_lacks(write):
    file = read_coco(write())
    with pytest.raises(AnnotationError, match="no category 'zebra'"):
        compare_names(("apple", "zebra"), file, is_training=True)
    lines = compare_names(("apple", "zebra"), file, is_training=False)
    assert any("without a score" in line and "zebra" in line for line in lines)


def test_a_subset_of_the_file_is_said(write):
    (line,) = compare_names(("apple",), read_coco(write()), is_training=True)
    assert "1 boxes of plum, pear are left out" in line
    (line,) = compare_names(("apple", "pear", "plum"), read_coco(write()), is_training=True)
    assert "no box of pear" in line
