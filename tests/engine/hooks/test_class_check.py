"""ClassCheckHook: what it refuses, and what it lets pass."""

from types import SimpleNamespace

import pytest
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset

from dinov3_mm.datasets.class_names import ClassNameError, labels_of
from dinov3_mm.engine.hooks import ClassCheckHook

ANIMALS = ("cat", "dog", "eel")


def runner(train, val=None, test=None, *, head=3, preprocessor=3):
    def loop(classes):
        metainfo = {} if classes == () else {"classes": classes}
        return SimpleNamespace(
            dataloader=SimpleNamespace(dataset=SimpleNamespace(metainfo=metainfo))
        )

    return SimpleNamespace(
        model=SimpleNamespace(
            head=SimpleNamespace(num_classes=head),
            data_preprocessor=SimpleNamespace(num_classes=preprocessor),
        ),
        train_dataloader=loop(train).dataloader,
        val_loop=None if val is None else loop(val),
        test_loop=None if test is None else loop(test),
    )


@pytest.mark.parametrize("val", [None, (), ANIMALS])
def test_agreement_passes(val):
    ClassCheckHook().before_train(runner(ANIMALS, val))
    ClassCheckHook().before_test(runner(ANIMALS, test=ANIMALS))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": ANIMALS, "head": 1000}, r"train_\w+.dataset has 3 .*model.head.num_classes=3"),
        ({"train": ANIMALS, "preprocessor": 7}, r"set model.data_preprocessor.num_classes=3"),
        ({"train": ANIMALS, "val": ANIMALS[:2]}, r"has the classes cat, dog, .* cannot be changed"),
    ],
)
def test_disagreement_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ClassCheckHook().before_train(runner(**given))


def test_more_outputs_than_classes_are_said_where_that_is_enough():
    run = Run(listed(0, 1, 2), outputs=7)
    ClassCheckHook(strict=False).before_train(run)
    assert any("has 3 classes" in line and "num_classes is 7" in line for line in run.lines)
    with pytest.raises(ValueError, match=r"num_classes is 2: set"):
        ClassCheckHook(strict=False).before_train(Run(listed(0, 1, 2), outputs=2))


def test_a_test_set_of_other_classes_is_refused():
    with pytest.raises(ValueError, match=r"test_dataloader\.dataset has 2 classes"):
        ClassCheckHook().before_test(runner(ANIMALS, test=ANIMALS[:2]))


class Listed(BaseDataset):
    """Samples of a file: name and label, no image is read."""

    def __init__(self, samples, classes=ANIMALS, **kwargs):
        self.samples = samples
        super().__init__(metainfo=dict(classes=classes) if classes else {}, **kwargs)

    def load_data_list(self):
        return [dict(img_path=str(path), gt_label=label) for path, label in self.samples]


def listed(*labels, classes=ANIMALS, wrap=lambda data: data):
    return wrap(Listed([(f"{n}.png", label) for n, label in enumerate(labels)], classes))


class Run:
    """What the hook needs of a runner."""

    def __init__(self, train, val=None, *, outputs=3, resume=False):
        self.lines = []
        self.logger = SimpleNamespace(info=self.lines.append)
        self._resume = resume
        self.model = SimpleNamespace(head=SimpleNamespace(num_classes=outputs))
        self.train_dataloader = SimpleNamespace(dataset=train)
        loop = SimpleNamespace(
            dataloader=SimpleNamespace(dataset=val), evaluator=SimpleNamespace(dataset_meta=None)
        )
        self.val_loop, self.test_loop = (None if val is None else loop), loop

    def check(self, checkpoint=None):
        hook = ClassCheckHook()
        if checkpoint is not None:
            meta = dict(dataset_meta=dict(classes=checkpoint))
            hook.after_load_checkpoint(self, dict(meta=meta))
        hook.before_train(self)
        return self


@pytest.mark.parametrize(
    "wrap",
    [
        lambda data: data,
        lambda data: RepeatDataset(data, 2),
        lambda data: ConcatDataset([data, listed(0, classes=("dog", "eel"))]),
    ],
)
def test_validation_gets_the_labels_of_training_by_name(wrap):
    val = listed(0, 1, 1, classes=("dog", "eel"), wrap=wrap)
    run = Run(listed(0, 1, 2), val).check()
    assert labels_of(val)[:3].tolist() == [1, 2, 2]
    assert val.metainfo["classes"] == ANIMALS == run.val_loop.evaluator.dataset_meta["classes"]
    assert val[0]["gt_label"] == 1
    assert any("has no images of 'cat'" in line for line in run.lines)


def test_what_training_does_not_have_is_refused_by_name():
    with pytest.raises(ClassNameError, match=r"has 'eels' \(1 images; nearest 'eel'\)"):
        Run(listed(0, 1, 2), listed(0, 2, classes=("cat", "dog", "eels"))).check()
    with pytest.raises(ClassNameError, match=r"no training image: 'eel' \(2 images\)"):
        Run(listed(0, 1), listed(0, 2, 2)).check()
    with pytest.raises(ClassNameError, match=r"numbers only.*give it metainfo"):
        Run(listed(0, 1, 2), listed(0, 1, classes=())).check()


def test_an_empty_folder_more_is_passed_over_and_an_untrained_output_said():
    val = listed(1, 2, classes=("aaa", "cat", "dog"))
    run = Run(listed(0, 1, classes=(*ANIMALS,)), val).check()
    assert labels_of(val).tolist() == [0, 1]
    assert any("'aaa' has no images and is no class of the training set" in x for x in run.lines)
    assert any("has no image of eel: an output that is never trained" in x for x in run.lines)


def test_a_single_class_and_labels_beyond_the_head():
    with pytest.raises(ValueError, match=r"all 2 images of .* are of one class, 'dog'"):
        Run(listed(1, 1)).check()
    with pytest.raises(ValueError, match=r"1 of 3 images .* first 2\.png with 3; expected 0 to 2"):
        Run(listed(0, 1, 3)).check()
    with pytest.raises(ValueError, match=r"first 1\.png with -1; expected 0 to 2"):
        Run(listed(0, 1), listed(0, -1)).check()
    with pytest.raises(ValueError, match=r"first 1\.png with 5; expected 0 to 2"):
        Run(listed(0, 5, classes=())).check()  # without names the head says how many


def test_images_that_are_in_both_are_said(tmp_path):
    for name, content in (("a", b"one"), ("b", b"two"), ("c", b"three")):
        (tmp_path / f"{name}.png").write_bytes(content)
    (tmp_path / "copy.png").write_bytes(b"two")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    train = Listed([(tmp_path / f"{name}.png", n) for n, name in enumerate("abc")])
    val = Listed([(tmp_path / "copy.png", 2), (tmp_path / "link.png", 0)])
    (line,) = [line for line in Run(train, val).check().lines if "training images too" in line]
    assert "2 of 2 validation images" in line and "1 of them of another class" in line
    (tmp_path / "other.png").write_bytes(b"six")
    val = Listed([(tmp_path / "other.png", 2)])
    assert not [line for line in Run(train, val).check().lines if "training images too" in line]


def test_a_run_that_goes_on_keeps_the_order_of_its_outputs():
    train, val = listed(0, 1, 2), listed(0, 1)
    stored = ("eel", "dog", "cat")
    Run(train, val, resume=True).check(stored)
    assert labels_of(train).tolist() == [2, 1, 0] and labels_of(val).tolist() == [2, 1]
    assert train.metainfo["classes"] == stored
    with pytest.raises(ClassNameError, match=r"only there \['ant'\], only in .* \['cat'\]"):
        Run(listed(0, 1, 2), resume=True).check(("ant", "dog", "eel"))
    run = Run(listed(0, 1, 2)).check(("ant", "dog", "eel"))
    assert any("outputs of its head mean others" in line for line in run.lines)


def test_a_test_follows_its_checkpoint():
    data = listed(0, 1, classes=("dog", "eel"))
    run, hook = Run(None, data), ClassCheckHook()
    hook.after_load_checkpoint(run, dict(meta=dict(CLASSES=ANIMALS, epoch=3)))
    hook.before_test(run)
    assert labels_of(data).tolist() == [1, 2]
