"""From the released outputs, counted by COCO's ids, to mmdet's COCO metric."""

import json
import math

import pytest
import torch
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope

import dinov3_mm.hosts  # noqa: F401
from tests.hosts.lane import require_hosts
from tests.models.detection import toys

require_hosts()

from mmdet.datasets import CocoDataset  # noqa: E402
from mmdet.evaluation import CocoMetric  # noqa: E402

from dinov3_mm.models.detection import COCO_CATEGORY_IDS  # noqa: E402
from dinov3_mm.models.detection.plain_detr import best_boxes  # noqa: E402

NAMES = CocoDataset.METAINFO["classes"]
# Ids of COCO with gaps below them: stop sign, toothbrush; and one without.
OBJECTS = {1: [5, 5, 30, 40], 13: [50, 20, 40, 40], 90: [10, 60, 20, 30]}
SIDE = 100


@pytest.fixture
def ann_file(tmp_path):
    """One image with three objects and a crowd of persons, in COCO's format (x, y, w, h)."""
    annotations = [
        {"id": i, "image_id": 7, "category_id": category, "bbox": box, "iscrowd": 0}
        for i, (category, box) in enumerate(OBJECTS.items(), start=1)
    ]
    crowd = {"id": 9, "image_id": 7, "category_id": 1, "bbox": [60, 60, 40, 40], "iscrowd": 1}
    for annotation in (*annotations, crowd):
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    content = {
        "images": [{"id": 7, "file_name": "7.jpg", "height": SIDE, "width": SIDE}],
        "annotations": [*annotations, crowd],
        "categories": [{"id": i, "name": n} for i, n in zip(COCO_CATEGORY_IDS, NAMES)],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return path


def detections(outputs):
    """Detections of queries that are sure of the class ``outputs`` at the places of the objects."""
    logits = torch.full((len(OBJECTS), 91), -9.0)
    for row, output in zip(logits, outputs):
        row[output] = 9.0
    boxes = torch.tensor([[x + w / 2, y + h / 2, w, h] for x, y, w, h in OBJECTS.values()])
    return best_boxes(logits[:, list(COCO_CATEGORY_IDS)], boxes.float(), len(OBJECTS), (SIDE, SIDE))


@pytest.mark.parametrize(("outputs", "ap"), [(list(OBJECTS), 1.0), ([13, 90, 1], 0.0)])
def test_average_precision_of_sure_outputs(outputs, ap, ann_file):
    metric = CocoMetric(ann_file=str(ann_file))
    metric.dataset_meta = {"classes": NAMES}
    sample = toys.sample((SIDE, SIDE))
    sample.set_metainfo({"img_id": 7})
    sample.pred_instances = detections(outputs)
    metric.process({}, [sample.to_dict()])
    assert math.isclose(metric.evaluate(size=1)["coco/bbox_mAP"], ap, abs_tol=1e-6)


def test_crowds_of_the_data_set_are_no_objects(ann_file):
    dataset = CocoDataset(ann_file=str(ann_file), data_prefix={"img": ""}, pipeline=[])
    with DefaultScope.overwrite_default_scope("mmdet"):
        pack = Compose([{"type": "LoadAnnotations", "with_bbox": True}, {"type": "PackDetInputs"}])
    image = torch.zeros(SIDE, SIDE, 3, dtype=torch.uint8).numpy()
    sample = pack(
        {**dataset[0], "img": image, "img_shape": (SIDE, SIDE), "ori_shape": (SIDE, SIDE)}
    )
    assert len(sample["data_samples"].ignored_instances) == 1
    head = toys.detector({"num_classes": 80, "category_ids": "coco"}).bbox_head
    assert head._target(sample["data_samples"]).labels.tolist() == list(OBJECTS)
