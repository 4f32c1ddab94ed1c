"""Label maps must fit the classes of a segmentation head."""

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS


@HOOKS.register_module()
class LabelCheckHook(Hook):
    """Ends a segmentation run on labels that the head does not have.

    On a GPU a label beyond the last class is an assertion in a kernel, without the label. The names
    of the classes are checked before the first step, the label maps of every batch before they go
    to the device.

    Raises:
        ValueError: If a data set has another number of classes than ``decode_head.num_classes``, or
            a label map holds a value that is neither a class nor the one to ignore.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner) -> None:
        """Check the names of the classes."""
        _check_classes(runner, "train", runner.train_dataloader.dataset)
        if runner.val_loop is not None:
            _check_classes(runner, "val", runner.val_loop.dataloader.dataset)

    def before_test(self, runner) -> None:
        """Check the names of the classes."""
        _check_classes(runner, "test", runner.test_loop.dataloader.dataset)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Check the label maps of a batch."""
        head = _head(runner)
        ignored = getattr(head, "ignore_index", 255)
        for sample in data_batch["data_samples"]:
            labels = sample.gt_sem_seg.data
            wrong = labels[(labels >= head.num_classes) & (labels != ignored)]
            if wrong.numel():
                raise ValueError(
                    f"the label map of {sample.get('img_path', 'an image')} holds "
                    f"{sorted(set(wrong.tolist()))[:5]}, and the head has classes 0 to "
                    f"{head.num_classes - 1} and ignores {ignored}: set "
                    "model.decode_head.num_classes, or reduce_zero_label=True in the data set if "
                    "its 0 is unlabelled and classes begin at 1"
                )


def _head(runner):
    model = runner.model
    # Wrapped for several processes, for augmented tests, or for both.
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model.decode_head


def _check_classes(runner, split: str, dataset) -> None:
    names = (getattr(dataset, "metainfo", None) or {}).get("classes")
    head = _head(runner)
    if names and len(names) != head.num_classes:
        raise ValueError(
            f"{split}_dataloader.dataset has {len(names)} classes ({', '.join(names[:3])}, ...), "
            f"but model.decode_head.num_classes is {head.num_classes}: set "
            f"model.decode_head.num_classes={len(names)}, or the data set's metainfo.classes"
        )
