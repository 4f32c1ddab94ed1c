"""DINOv3ViT in mmdet's Faster and Mask R-CNN, over a pyramid, from mmdet's own base configs."""

import pytest
import torch
from mmengine.hub import get_config

from tests.hosts import toys
from tests.hosts.lane import require_hosts

require_hosts()

STRIDES = (2, 4, 8, 16, 32)
PYRAMID = {
    "type": "SimpleFeaturePyramid",
    "in_channels": toys.DIMS,
    "out_channels": 16,
    "in_stride": toys.PATCH,
    "num_outs": 5,
}


def narrow(config: dict) -> dict:
    """mmdet's model with 16 channels, 3 classes, few proposals, and the strides of the pyramid."""
    roi = config["roi_head"]
    config["rpn_head"].update(in_channels=16, feat_channels=16)
    config["rpn_head"]["anchor_generator"]["strides"] = list(STRIDES)
    roi["bbox_head"].update(in_channels=16, fc_out_channels=32, num_classes=3)
    parts = ["bbox_roi_extractor"]
    if "mask_head" in roi:
        roi["mask_head"].update(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=3)
        parts.append("mask_roi_extractor")
    for part in parts:
        roi[part].update(out_channels=16, featmap_strides=list(STRIDES[:4]))
    for phase in (config["train_cfg"]["rpn_proposal"], config["test_cfg"]["rpn"]):
        phase.update(nms_pre=50, max_per_img=20)
    config["test_cfg"]["rcnn"].update(score_thr=0.0, max_per_img=5)
    return config


def samples(with_masks: bool):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 18.0, 60.0, 62.0]])
    result = []
    for _ in range(2):
        sample = DetDataSample(
            metainfo={
                "img_shape": (64, 64),
                "ori_shape": (64, 64),
                "batch_input_shape": (64, 64),
                "scale_factor": (1.0, 1.0),
            }
        )
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 2]))
        if with_masks:
            masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
                mask[y1:y2, x1:x2] = 1
            sample.gt_instances.masks = BitmapMasks(masks.numpy(), 64, 64)
        result.append(sample)
    return result


@pytest.mark.parametrize("name", ["faster-rcnn_r50_fpn", "mask-rcnn_r50_fpn"])
def test_detector_on_frozen_features(name, tmp_path):
    model = narrow(get_config(f"mmdet::_base_/models/{name}.py").model.to_dict())
    model["backbone"] = toys.backbone_config(tmp_path)
    model["neck"] = PYRAMID
    model = toys.build_model("mmdet", model, tmp_path)
    assert model.neck.strides == STRIDES
    with_masks = name.startswith("mask")
    outcome = toys.run(model, samples(with_masks))
    expected = {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "acc", "loss_bbox"}
    assert set(outcome.losses) == expected | ({"loss_mask"} if with_masks else set())
    for prediction in outcome.predictions:
        found = prediction.pred_instances
        assert len(found) == 5 and found.bboxes.shape == (5, 4)
        assert not with_masks or found.masks.shape == (5, 64, 64)
    toys.assert_backbone_is_frozen_and_loaded(model.backbone)
    toys.assert_trains(model.neck, model.rpn_head)
