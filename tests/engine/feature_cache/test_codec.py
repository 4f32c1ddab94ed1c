"""Samples of every host as tensors and JSON, and back."""

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData, PixelData

from dinov3_mm.engine.feature_cache.codec import decode, encode
from tests.hosts.lane import require_hosts


def round_trip(value):
    structure, tensors = encode(value)
    return decode(structure, tensors.__getitem__)


def test_plain_values():
    value = {"a": [1, 2.5, None, True, "x"], "b": (torch.arange(3), np.arange(4.0)), "c": {}}
    result = round_trip(value)
    assert result["a"] == value["a"] and isinstance(result["b"], tuple)
    assert torch.equal(result["b"][0], value["b"][0])
    assert np.array_equal(result["b"][1], value["b"][1])
    assert round_trip(np.float32(0.5)) == 0.5
    assert round_trip(torch.Size((2, 3))) == (2, 3)


def test_samples_of_the_hosts():
    require_hosts()
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks, PolygonMasks
    from mmpretrain.structures import DataSample
    from mmseg.structures import SegDataSample

    sample = DataSample(metainfo={"img_shape": (3, 4)}).set_gt_label(2)
    result = round_trip(sample)
    assert type(result) is DataSample and result.gt_label.item() == 2
    assert result.img_shape == (3, 4)
    sample = SegDataSample(gt_sem_seg=PixelData(data=torch.arange(6).view(1, 2, 3)))
    assert torch.equal(round_trip(sample).gt_sem_seg.data, sample.gt_sem_seg.data)
    boxes = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    for given in (boxes, HorizontalBoxes(boxes)):
        for masks in (
            BitmapMasks(np.eye(4, dtype=np.uint8)[None], 4, 4),
            PolygonMasks([[np.array([0.0, 0, 2, 0, 2, 2])]], 4, 4),
        ):
            truth = InstanceData(bboxes=given, labels=torch.tensor([1]), masks=masks)
            result = round_trip(DetDataSample(gt_instances=truth)).gt_instances
            assert type(result.bboxes) is type(given) and type(result.masks) is type(masks)
            assert torch.equal(
                torch.as_tensor(getattr(result.bboxes, "tensor", result.bboxes)), boxes
            )
            assert np.array_equal(result.masks.to_ndarray(), masks.to_ndarray())


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="a set cannot be stored"):
        encode({"a": {1, 2}})
