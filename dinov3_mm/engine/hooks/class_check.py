"""The classes of the data sets and the outputs of a classifier must be the same."""

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS


@HOOKS.register_module()
class ClassCheckHook(Hook):
    """Ends a run before its first step if the data do not have the classes that the head has.

    On a GPU a label beyond the last output is an assertion in a kernel, without the label. And a
    folder of validation images that lacks a class has, silently, other labels than training.

    Raises:
        ValueError: if a data set names another number of classes than ``head.num_classes`` or the
            preprocessor's, or validation names other classes than training.
    """

    def before_train(self, runner) -> None:
        """Check training and validation data."""
        trained = _classes(runner.train_dataloader.dataset)
        _check_count(runner, "train", trained)
        if runner.val_loop is None:
            return
        validated = _classes(runner.val_loop.dataloader.dataset)
        _check_count(runner, "val", validated)
        if trained and validated and trained != validated:
            only = [sorted(set(trained) - set(validated)), sorted(set(validated) - set(trained))]
            raise ValueError(
                f"training has {len(trained)} classes and validation {len(validated)}, and they "
                f"are not the same: only in training {only[0][:5]}, only in validation "
                f"{only[1][:5]}; give both data sets the same class folders, in the same order"
            )

    def before_test(self, runner) -> None:
        """Check test data."""
        _check_count(runner, "test", _classes(runner.test_loop.dataloader.dataset))


def _classes(dataset) -> tuple[str, ...]:
    return tuple((getattr(dataset, "metainfo", None) or {}).get("classes") or ())


def _check_count(runner, split: str, classes: tuple[str, ...]) -> None:
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    for part in ("head", "data_preprocessor"):
        outputs = getattr(getattr(model, part, None), "num_classes", None)
        if classes and outputs not in (None, len(classes)):
            raise ValueError(
                f"{split}_dataloader.dataset has {len(classes)} classes ({_some(classes)}), but "
                f"model.{part}.num_classes is {outputs}: set model.{part}.num_classes="
                f"{len(classes)}"
            )


def _some(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
