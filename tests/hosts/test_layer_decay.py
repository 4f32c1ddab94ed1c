"""LayerDecayOptimConstructor in models of the hosts: scopes, segmentors, LoRA."""

import pytest
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

from tests.hosts import toys
from tests.hosts.lane import require_hosts

require_hosts()

LR, DECAY = 0.1, 0.5
NUM_LAYERS = toys.TOY_ARCH["num_layers"]


def rates(model, scope):
    cfg = {
        "constructor": "LayerDecayOptimConstructor",
        "optimizer": {"type": "AdamW", "lr": LR, "weight_decay": 0.05},
        "paramwise_cfg": {"layerwise_decay": DECAY},
    }
    with DefaultScope.overwrite_default_scope(scope):
        wrapper = build_optim_wrapper(model, cfg)
    return {
        name: group["lr"] / LR
        for group in wrapper.optimizer.param_groups
        for name in group["param_names"]
    }


def segmentor(folder, **backbone):
    model = {
        "type": "EncoderDecoder",
        "data_preprocessor": {"type": "SegDataPreProcessor", "size": (64, 64)},
        "backbone": toys.backbone_config(folder, **backbone),
        "decode_head": {
            "type": "FCNHead",
            "in_channels": toys.DIMS,
            "channels": toys.DIMS,
            "in_index": 0,
            "num_convs": 0,
            "concat_input": False,
            "num_classes": 3,
            "align_corners": False,
        },
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
    }
    return toys.build_model("mmseg", model, folder)


@pytest.mark.parametrize("frozen", [-1, 1, NUM_LAYERS])
def test_segmentor(tmp_path, frozen):
    model = segmentor(tmp_path, frozen_stages=frozen)
    given = rates(model, "mmseg")
    assert set(given) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert given["decode_head.conv_seg.weight"] == 1
    for index in range(max(frozen, 0), NUM_LAYERS):
        expected = DECAY ** (NUM_LAYERS - index)
        assert given[f"backbone.blocks.{index}.mlp.fc1.weight"] == pytest.approx(expected)
    assert any(name.startswith("backbone.") for name in given) == (frozen < NUM_LAYERS)


def test_lora(tmp_path):
    import mmpretrain.models  # noqa: F401

    backbone = toys.backbone_config(tmp_path, out_type="cls_token", frozen_stages=-1)
    model = {
        "type": "ImageClassifier",
        "backbone": {
            "type": "LoRAModel",
            "module": backbone,
            "alpha": 4,
            "rank": 2,
            "targets": [{"type": ".*attn.qkv"}],
        },
        "head": {"type": "LinearClsHead", "num_classes": 3, "in_channels": toys.DIMS},
    }
    given = rates(toys.build_model("mmpretrain", model, tmp_path), "mmpretrain")
    low_rank = {name: rate for name, rate in given.items() if "lora_" in name}
    assert len(low_rank) == 2 * NUM_LAYERS
    assert set(given) - set(low_rank) == {"head.fc.weight", "head.fc.bias"}
    for name, rate in low_rank.items():
        index = int(name.partition("blocks.")[2].partition(".")[0])
        assert rate == pytest.approx(DECAY ** (NUM_LAYERS - index))
