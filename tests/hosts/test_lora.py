"""Fine-tuning with mmpretrain's LoRAModel, and its export as a plain backbone."""

import pytest
import torch

from dinov3_mm.checkpoints import build_backbone, export_backbone
from tests.checkpoints.toys import assert_same_tensors, redraw, tensors_of, toy_backbone
from tests.golden import assert_parity
from tests.hosts import toys
from tests.hosts.lane import require_hosts

require_hosts()

ADAPTERS = [".lora_down.weight", ".lora_up.weight"]


def classifier(folder, targets):
    lora = {
        "type": "mmpretrain.LoRAModel",
        "module": toys.backbone_config(folder, out_type="cls_token", frozen_stages=-1),
        "alpha": 8,
        "rank": 4,
        "targets": [{"type": target} for target in targets],
    }
    model = {
        "type": "ImageClassifier",
        "data_preprocessor": {"num_classes": 5, "to_rgb": True, **toys.STATISTICS},
        "backbone": lora,
        "head": {"type": "LinearClsHead", "num_classes": 5, "in_channels": toys.DIMS},
    }
    return toys.build_model("mmpretrain", model, folder)


def samples():
    from mmpretrain.structures import DataSample

    return [DataSample().set_gt_label(label) for label in (1, 4)]


def test_only_adapters_and_head_train_and_are_stored(tmp_path):
    model = classifier(tmp_path, [".*attn.qkv"])
    x = toys.normalised(toys.images())
    with torch.no_grad():
        # Fresh adapters add nothing, so the pretrained features come out: the weights were loaded.
        assert torch.equal(model.backbone(x)[0], toy_backbone(1, out_type="cls_token")(x)[0])
    toys.run(model, samples())
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    adapted = {f"backbone.module.blocks.{i}.attn.qkv{part}" for i in (0, 1) for part in ADAPTERS}
    assert names == adapted | {"head.fc.weight", "head.fc.bias"}
    assert {name for name in model.state_dict() if name.startswith("backbone.")} == adapted


@pytest.mark.parametrize("inner", [False, True])
@torch.no_grad()
def test_export_folds_the_adapters_in(inner, tmp_path):
    model = classifier(tmp_path, [".*attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
    wrapped = redraw(model.backbone, seed=5)
    backbone = wrapped.module if inner else wrapped
    before = tensors_of(wrapped.module)
    path = export_backbone(backbone, tmp_path / "merged.safetensors")
    assert_same_tensors(wrapped.module.state_dict(), before)
    merged = build_backbone(path, out_type="raw")
    assert set(merged.state_dict()) == set(toy_backbone().state_dict())
    x = toys.normalised(toys.images())
    wrapped.module.out_type = "raw"
    expected = wrapped(x)[0]
    difference = assert_parity(merged(x)[0], expected)
    for name, parameter in wrapped.named_parameters():
        if name.endswith("lora_up.weight"):
            parameter.zero_()
    print(f"merged: {difference:.1e}; adapters change the features by ", end="")
    print(f"{(wrapped(x)[0] - expected).abs().max():.1e}")
    assert (wrapped(x)[0] - expected).abs().max() > 0.1
