"""mmdet's COCO data set and metric with classes matched by name, see :mod:`.coco`."""

import os
from collections.abc import Sequence
from functools import partial

from mmengine.logging import print_log
from mmengine.registry import DATASETS, METRICS

from dinov3_mm.datasets.coco import read_coco
from dinov3_mm.hosts import require_host

require_host("mmdet")
from mmdet.datasets import CocoDataset  # noqa: E402
from mmdet.datasets.api_wrappers import COCO  # noqa: E402
from mmdet.evaluation import CocoMetric  # noqa: E402


def _ordered_api(path: str | os.PathLike, *, classes: Sequence[str]) -> COCO:
    file = read_coco(path)
    for line in file.remarks():
        print_log(line, logger="current")
    api = COCO()
    api.dataset = file.in_order_of(classes)
    api.createIndex()
    return api


@DATASETS.register_module()
class NamedCocoDataset(CocoDataset):
    """mmdet's ``CocoDataset`` with labels that follow the names in ``metainfo.classes``.

    Label ``i`` is the category of the name ``classes[i]``, whatever the order and the ids of the
    file. Arguments are those of ``CocoDataset``.

    Raises:
        AnnotationError: see :func:`read_coco`.
    """

    def load_data_list(self) -> list[dict]:
        """Entries of the images."""
        self.COCOAPI = partial(_ordered_api, classes=tuple(self.metainfo["classes"]))
        try:
            return super().load_data_list()
        finally:
            del self.COCOAPI


@METRICS.register_module()
class NamedCocoMetric(CocoMetric):
    """mmdet's ``CocoMetric`` with categories that follow the names of the data set's classes.

    Without ``ann_file`` the truth comes with the samples, as in ``CocoMetric``. Result files of
    ``format_only`` carry the ids of ``ann_file``. Arguments are those of ``CocoMetric``.

    Raises:
        AnnotationError: see :func:`read_coco`.
    """

    def __init__(self, ann_file: str | None = None, **kwargs) -> None:
        super().__init__(ann_file=None, **kwargs)
        self.ann_file = ann_file

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Keep the predictions of a batch; the names are known from the first one on."""
        if self._coco_api is None and self.ann_file is not None:
            self._coco_api = _ordered_api(self.ann_file, classes=self.dataset_meta["classes"])
        super().process(data_batch, data_samples)

    def results2json(self, results: Sequence[dict], outfile_prefix: str) -> dict[str, str]:
        """Write predictions; returns the files by kind."""
        if not (self.format_only and self.ann_file):
            return super().results2json(results, outfile_prefix)
        own = {name: number for number, name in read_coco(self.ann_file).categories.items()}
        ordered = self.cat_ids
        self.cat_ids = [own.get(name, -1) for name in self.dataset_meta["classes"]]
        try:
            return super().results2json(results, outfile_prefix)
        finally:
            self.cat_ids = ordered
