"""DINOv3ViT in mmpretrain's ImageClassifier."""

import math

import torch

from tests.hosts import toys
from tests.hosts.lane import require_hosts

require_hosts()


def classifier(folder, **arguments):
    model = {
        "type": "ImageClassifier",
        "data_preprocessor": {"num_classes": 5, "to_rgb": True, **toys.STATISTICS},
        "backbone": toys.backbone_config(folder, out_type="cls_token", **arguments),
        "head": {"type": "LinearClsHead", "num_classes": 5, "in_channels": toys.DIMS},
    }
    return toys.build_model("mmpretrain", model, folder)


def samples():
    from mmpretrain.structures import DataSample

    return [DataSample().set_gt_label(label) for label in (1, 4)]


def test_linear_classifier_on_frozen_features(tmp_path):
    model = classifier(tmp_path)
    outcome = toys.run(model, samples())
    assert abs(outcome.total - math.log(5)) < 1
    assert [prediction.pred_score.shape for prediction in outcome.predictions] == [(5,), (5,)]
    toys.assert_backbone_is_frozen_and_loaded(model.backbone)
    toys.assert_trains(model.head)


def test_fine_tuning_reaches_every_parameter_that_is_used(tmp_path):
    model = classifier(tmp_path, frozen_stages=-1)
    toys.run(model, samples())
    toys.assert_trains(model.head, *model.backbone.blocks, model.backbone.patch_embed)


def test_frozen_stages_freeze_the_first_blocks(tmp_path):
    model = classifier(tmp_path, frozen_stages=1)
    toys.run(model, samples())
    frozen, trained = model.backbone.blocks
    assert all(parameter.grad is None for parameter in frozen.parameters())
    toys.assert_trains(trained)
    assert torch.equal(frozen.norm1.weight, toys.toy_backbone(1).blocks[0].norm1.weight)
