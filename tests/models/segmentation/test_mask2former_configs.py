"""What the Mask2Former configs say about backbones is what these are, at full size on meta."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

import dinov3_mm
from tests.downstream.steps import CONFIGS, configs_of
from tests.hosts.lane import require_hosts

require_hosts()

import dinov3_mm.models.adapters.vit_adapter  # noqa: E402, F401

PATHS = [case for case in configs_of("segmentation") if "mask2former" in case.id]


def without_weights(backbone):
    backbone = {**backbone, "init_cfg": None}
    if "backbone" in backbone:
        backbone["backbone"] = {**backbone["backbone"], "init_cfg": None}
    return backbone


@pytest.mark.parametrize("path", PATHS)
def test_head_fits_the_backbone(path):
    cfg = Config.fromfile(path)
    with torch.device("meta"):
        backbone = MODELS.build(without_weights(cfg.model.backbone))
    if cfg.model.backbone.type == "DINOv3ViTAdapter":
        widths = [backbone.embed_dims] * 4
        inner = backbone.backbone
        assert backbone.interaction_indexes[-1] == inner.num_layers - 1
    else:
        widths, inner = list(backbone.feature_dims), backbone
        assert backbone.out_indices == (0, 1, 2, 3)
    assert cfg.model.decode_head.in_channels == widths
    tuned = path.stem.endswith("_tuned")
    assert any(p.requires_grad for p in inner.parameters()) == tuned


@pytest.mark.parametrize("path", PATHS)
def test_crops_are_multiples_of_32(path):
    cfg = Config.fromfile(path)
    crop = next(s for s in cfg.train_dataloader.dataset.pipeline if s.type == "RandomCrop")
    sides = [*crop.crop_size, *cfg.model.data_preprocessor.size]
    assert not any(side % 32 for side in sides)


def test_the_released_segmentor_has_its_numbers():
    cfg = Config.fromfile(CONFIGS / "segmentation/mask2former_vit7b16_ade20k.py")
    model = cfg.model
    assert model.backbone.interaction_indexes == [9, 19, 29, 39]
    assert (model.decode_head.feat_channels, model.decode_head.num_classes) == (2048, 150)
    assert model.test_cfg == dict(mode="slide", crop_size=(896, 896), stride=(596, 596))
    kinds = (model.backbone.init_cfg.kind, model.decode_head.init_cfg.kind)
    assert kinds == ("mask2former_adapter", "mask2former")
