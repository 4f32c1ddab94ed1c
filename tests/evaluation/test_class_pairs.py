"""Monitors match the classes of their two sources by name; the cases are those of acceptance."""

import pytest

from dinov3_mm.datasets import ImageFolder, ImageList
from dinov3_mm.datasets.class_names import ClassNameError
from dinov3_mm.datasets.evaluation_images import check_semantic_classes, paired_labels
from dinov3_mm.datasets.sources import ReadableSubset
from tests.acceptance import class_names
from tests.evaluation.toys import ColourSquares


@pytest.mark.parametrize("case", class_names.PAIRS)
def test_two_folders(case, tmp_path):
    train, other, expected = class_names.PAIRS[case]
    found = class_names.outcome(class_names.monitor_pair, tmp_path, train, other)
    assert class_names.is_right(found, expected), found


@pytest.mark.parametrize("case", class_names.LISTS)
def test_lists(case, tmp_path):
    run, expected = class_names.LISTS[case]
    found = class_names.outcome(run, tmp_path)
    assert class_names.is_right(found, expected), found


def test_images_beside_class_folders_are_named(tmp_path):
    class_names.paint(tmp_path, class_names.AS_THEY_ARE)
    (tmp_path / "ant/0.png").rename(tmp_path / "stray.png")
    source = ImageFolder(str(tmp_path))
    assert source.classes == ()
    with pytest.raises(ValueError, match=r"no labels: 4 folders and 1 images .* e\.g\. .*stray"):
        source.label(0)


def test_one_folder_too_high_is_refused(tmp_path):
    class_names.paint(tmp_path / "train", class_names.AS_THEY_ARE)
    class_names.paint(tmp_path / "val", class_names.AS_THEY_ARE)
    whole, part = ImageFolder(str(tmp_path)), ImageFolder(str(tmp_path / "val"))
    with pytest.raises(ClassNameError, match=r"Classes of the training set .*: train, val"):
        paired_labels(whole, part)


def test_samples_keep_the_names_and_say_which_classes_they_lost(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        "dinov3_mm.datasets.evaluation_images.print_log", lambda line, **_: said.append(line)
    )
    class_names.paint(tmp_path / "train", class_names.AS_THEY_ARE)
    class_names.paint(tmp_path / "test", class_names.WITHOUT_FIRST)
    train, test = (
        ReadableSubset(dict(type="ImageFolder", root=str(tmp_path / part)), length=length)
        for part, length in (("train", 2), ("test", 9))
    )
    labels, test_labels = paired_labels(train, test)
    assert labels.tolist() == [0, 3] and test_labels.tolist() == [1] * 3 + [2] * 3 + [3] * 3
    assert any("6 of 9 test images are of 2 classes without a training image" in x for x in said)


def test_a_source_that_names_nothing_is_refused_beside_one_that_does(tmp_path):
    class_names.paint(tmp_path, class_names.AS_THEY_ARE)
    folder, numbers = ImageFolder(str(tmp_path)), ColourSquares(8)
    with pytest.raises(ClassNameError, match="the ColourSquares has numbers only"):
        paired_labels(folder, numbers)
    assert [part.tolist() for part in paired_labels(numbers, numbers)] == [[0, 1, 2, 3] * 2] * 2


def test_numbers_of_lists(tmp_path):
    listing = tmp_path / "list.csv"
    listing.write_text("path,label\na.png,1_0\nb.png,2\n")  # int() would read ten
    assert ImageList(str(listing)).classes == ("1_0", "2")
    listing.write_text("path,label\na.png,48484848\nb.png,2\n")
    with pytest.raises(ValueError, match="write identifiers as names, such as id48484848"):
        ImageList(str(listing))


def test_semantic_classes():
    train, test = ColourSquares(4), ColourSquares(4)
    assert check_semantic_classes(train, test) == 5
    train.semantic_classes, test.semantic_classes = ("a", *"bcde"), ("b", *"acde")
    with pytest.raises(ClassNameError, match="same classes in the same order"):
        check_semantic_classes(train, test)
    test.semantic_classes, test.num_semantic_classes = None, 4
    with pytest.raises(ClassNameError, match=r"has 5 semantic classes .* the test source 4"):
        check_semantic_classes(train, test)
