"""Folders of images as a data set of mmpretrain: one folder a class."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from dinov3_mm.datasets.sources import ImageFolder


@DATASETS.register_module()
class ClassificationFolder(BaseDataset):
    """Images in one folder a class; the sorted names of the folders are the classes.

    In place of mmpretrain's ``CustomDataset``: the same images as :class:`ImageFolder` finds, so
    every ending that the decoder reads, through links, without hidden entries. A folder without
    images is a class too.

    Args:
        data_root: root of the data set.
        data_prefix: folder of the classes below it.
        metainfo: ``classes`` renames them, in the order of the folders.
        pipeline, test_mode, lazy_init, indices, filter_cfg, serialize_data, max_refetch: as in
            every data set of MMEngine.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds no images, images outside of the folders of the classes, or another
            number of classes than ``metainfo`` names.
    """

    def __init__(
        self,
        data_root: str = "",
        data_prefix: str | dict[str, str] = "",
        *,
        metainfo: dict | None = None,
        pipeline: Sequence[dict | Callable] = (),
        **kwargs: Any,
    ) -> None:
        if isinstance(data_prefix, str):
            data_prefix = {"img_path": data_prefix}
        root = str(Path(data_root).expanduser()) if data_root else ""
        super().__init__(
            data_root=root,
            data_prefix=dict(data_prefix),
            metainfo=metainfo,
            pipeline=list(pipeline),
            **kwargs,
        )

    def load_data_list(self) -> list[dict[str, Any]]:
        """Paths and labels of all images."""
        folder = ImageFolder(self.data_prefix["img_path"])
        if not folder.classes:
            raise ValueError(
                f"{folder.root} holds images outside of class folders, e.g. {folder.path(0)}; "
                "expected one folder a class, and nothing beside them"
            )
        names = self._metainfo.setdefault("classes", folder.classes)
        if len(names) != len(folder.classes):
            raise ValueError(
                f"metainfo names {len(names)} classes, {folder.root} has {len(folder.classes)} "
                f"folders ({', '.join(folder.classes[:5])})"
            )
        return [
            {"img_path": folder.path(index), "gt_label": folder.label(index)}
            for index in range(len(folder))
        ]

    def get_cat_ids(self, idx: int) -> list[int]:
        """Class of a sample, for samplers that balance them."""
        return [int(self.get_data_info(idx)["gt_label"])]
