"""Checkpoints of a head on a frozen backbone: what they hold, and how they load."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import load_checkpoint
from torch import nn

from dinov3_mm.checkpoints import DINOv3Pretrained, export_backbone
from dinov3_mm.engine.hooks import FrozenBackboneHook
from dinov3_mm.models.backbones import DINOv3ConvNeXt, DINOv3ViT
from tests.checkpoints.toys import TOY_ARCH, assert_same_tensors, redraw, tensors_of, toy_backbone


class Probe(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(32, 3)


def frozen_probe(weights, **arguments) -> Probe:
    arguments = {"frozen_stages": TOY_ARCH["num_layers"], **arguments}
    backbone = DINOv3ViT(arch=TOY_ARCH, patch_size=8, **arguments)
    DINOv3Pretrained(weights)(backbone)
    return Probe(backbone)


def saved(model: nn.Module, path) -> dict:
    """Write a checkpoint as MMEngine's runner does, through the hook."""
    runner = SimpleNamespace(model=model, logger=logging.getLogger("test"))
    hook, checkpoint = FrozenBackboneHook(), {"state_dict": model.state_dict(), "meta": {}}
    hook.before_train(runner)
    hook.before_save_checkpoint(runner, checkpoint)
    torch.save(copy.deepcopy(checkpoint), path)
    return checkpoint


@pytest.fixture
def weights(tmp_path):
    return export_backbone(toy_backbone(1), tmp_path / "weights.safetensors")


@pytest.mark.parametrize("loader", ["mmengine", "torch"])
def test_a_head_checkpoint_restores_the_backbone(weights, tmp_path, loader):
    model = frozen_probe(weights)
    checkpoint = saved(model, tmp_path / "head.pth")
    assert set(checkpoint["state_dict"]) == {
        "head.weight",
        "head.bias",
        "backbone.weights_record",
    }
    assert checkpoint["meta"]["frozen_backbones"]["backbone"]["source"] == str(weights)
    fresh = Probe(redraw(DINOv3ViT(arch=TOY_ARCH, patch_size=8), 5))
    if loader == "mmengine":
        load_checkpoint(fresh, str(tmp_path / "head.pth"), strict=True)
    else:
        fresh.load_state_dict(torch.load(tmp_path / "head.pth", weights_only=True)["state_dict"])
    assert_same_tensors(tensors_of(fresh), tensors_of(model))


def test_convnext_too(tmp_path):
    arch = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
    weights = export_backbone(redraw(DINOv3ConvNeXt(arch=arch), 2), tmp_path / "c.safetensors")
    backbone = DINOv3ConvNeXt(arch=arch, frozen_stages=4)
    DINOv3Pretrained(weights)(backbone)
    checkpoint = saved(Probe(backbone), tmp_path / "head.pth")
    assert len(checkpoint["state_dict"]) == 3
    fresh = Probe(DINOv3ConvNeXt(arch=arch))
    load_checkpoint(fresh, str(tmp_path / "head.pth"), strict=True)
    assert_same_tensors(tensors_of(fresh.backbone), tensors_of(backbone))


def test_a_moved_file_is_found_by_the_folder(weights, tmp_path, monkeypatch):
    saved(frozen_probe(weights), tmp_path / "head.pth")
    moved = tmp_path / "elsewhere" / weights.name
    moved.parent.mkdir()
    weights.rename(moved)
    fresh = Probe(DINOv3ViT(arch=TOY_ARCH, patch_size=8))
    with pytest.raises(FileNotFoundError, match="DINOV3_MM_WEIGHTS"):
        load_checkpoint(fresh, str(tmp_path / "head.pth"))
    monkeypatch.setenv("DINOV3_MM_WEIGHTS", str(moved.parent))
    load_checkpoint(fresh, str(tmp_path / "head.pth"))
    assert_same_tensors(tensors_of(fresh.backbone), tensors_of(toy_backbone(1)))


def test_other_weights_of_that_name_are_refused(weights, tmp_path):
    saved(frozen_probe(weights), tmp_path / "head.pth")
    export_backbone(toy_backbone(2), weights)
    with pytest.raises(ValueError, match="not those of the frozen backbone"):
        load_checkpoint(Probe(DINOv3ViT(arch=TOY_ARCH, patch_size=8)), str(tmp_path / "head.pth"))


def test_a_backbone_that_trains_is_saved(weights, tmp_path):
    checkpoint = saved(frozen_probe(weights, frozen_stages=1), tmp_path / "all.pth")
    assert "backbone.blocks.1.attn.qkv.weight" in checkpoint["state_dict"]
    assert "frozen_backbones" not in checkpoint["meta"]


def test_random_weights_are_saved(tmp_path):
    backbone = DINOv3ViT(arch=TOY_ARCH, patch_size=8, frozen_stages=TOY_ARCH["num_layers"])
    checkpoint = saved(Probe(backbone), tmp_path / "all.pth")
    assert "backbone.blocks.1.attn.qkv.weight" in checkpoint["state_dict"]


def test_a_frozen_backbone_that_changes_is_noticed(weights):
    model = frozen_probe(weights)
    runner = SimpleNamespace(model=model, logger=logging.getLogger("test"))
    hook = FrozenBackboneHook()
    hook.before_train(runner)
    with torch.no_grad():
        model.backbone.blocks[0].attn.proj.weight += 1e-3
    with pytest.raises(RuntimeError, match="backbone is frozen, but its tensors have changed"):
        hook.before_save_checkpoint(runner, {"state_dict": model.state_dict(), "meta": {}})
