"""Labels that a segmentation head does not have end the run before they reach the loss."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseTTAModel

from dinov3_mm.engine.hooks import LabelCheckHook


def runner(num_classes=3, train=("a", "b", "c"), val=("a", "b", "c")):
    def loader(classes):
        return SimpleNamespace(dataset=SimpleNamespace(metainfo={"classes": classes}))

    model = torch.nn.Module()
    model.decode_head = torch.nn.Module()
    model.decode_head.num_classes, model.decode_head.ignore_index = num_classes, 255
    return SimpleNamespace(
        model=model,
        train_dataloader=loader(train),
        val_loop=None if val is None else SimpleNamespace(dataloader=loader(val)),
        test_loop=SimpleNamespace(dataloader=loader(val)),
    )


class Sample(dict):
    def __init__(self, labels):
        super().__init__(img_path="street.png")
        self.gt_sem_seg = SimpleNamespace(data=torch.as_tensor(labels))


def check(labels, **arguments):
    batch = {"data_samples": [Sample([[0]]), Sample(labels)]}
    LabelCheckHook().before_train_iter(runner(**arguments), 0, batch)


def test_labels_of_the_head_pass():
    check([[0, 2], [255, 1]])
    check([[255, 255]])
    LabelCheckHook().before_train(runner())
    LabelCheckHook().before_train(runner(val=None))
    LabelCheckHook().before_train(runner(train=()))


@pytest.mark.parametrize("labels", [[[0, 3]], [[254, 0]]])
def test_other_labels_are_named(labels):
    wrong = max(value for value in labels[0])
    with pytest.raises(ValueError, match=rf"street\.png holds \[{wrong}\], .* classes 0 to 2"):
        check(labels)


@pytest.mark.parametrize("split", ["train", "val"])
def test_another_number_of_classes(split):
    message = rf"{split}_dataloader\.dataset has 4 classes .* set model\.decode_head\.num_classes=4"
    with pytest.raises(ValueError, match=message):
        LabelCheckHook().before_train(runner(**{split: ("a", "b", "c", "d")}))
    if split == "val":
        with pytest.raises(ValueError, match=r"test_dataloader\.dataset has 4 classes"):
            LabelCheckHook().before_test(runner(val=("a", "b", "c", "d")))


def test_models_inside_a_wrapper_for_augmented_tests():
    class Averaged(BaseTTAModel):
        def merge_preds(self, data_samples_list):
            return data_samples_list

    wrapped = runner(val=("a", "b", "c", "d"))
    wrapped.model.test_step = None
    wrapped.model = Averaged(wrapped.model)
    with pytest.raises(ValueError, match=r"test_dataloader\.dataset has 4 classes"):
        LabelCheckHook().before_test(wrapped)
