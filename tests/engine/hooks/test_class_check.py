"""ClassCheckHook: what it refuses, and what it lets pass."""

from types import SimpleNamespace

import pytest

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
        ({"train": ANIMALS, "val": ANIMALS[:2]}, "val_dataloader.dataset has 2 classes"),
        (
            {"train": ANIMALS, "val": ("cat", "dog", "fox")},
            r"only in training \['eel'\].*\['fox'\]",
        ),
    ],
)
def test_disagreement_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ClassCheckHook().before_train(runner(**given))


def test_a_test_set_of_other_classes_is_refused():
    with pytest.raises(ValueError, match=r"test_dataloader\.dataset has 2 classes"):
        ClassCheckHook().before_test(runner(ANIMALS, test=ANIMALS[:2]))
