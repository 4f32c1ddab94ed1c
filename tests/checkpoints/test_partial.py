"""Fewer than all tensors: an error by default, on request a load that says what is left."""

import pytest
import torch
from mmengine.registry import MODELS

from dinov3_mm.checkpoints import build_backbone, load_backbone_weights
from tests.checkpoints.toys import TOY_ARCH, assert_same_tensors, tensors_of, toy_backbone


@pytest.fixture
def path(tmp_path):
    """Weights of patch size 8 that lack a tensor and have one too many."""
    state = tensors_of(toy_backbone(1))
    del state["blocks.1.mlp.fc2.bias"]
    state["pos_embed"] = torch.zeros(1, 17, 32)
    torch.save(state, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def check(backbone, before, path):
    """All tensors are those of the file, but for the two that do not fit."""
    stored = torch.load(path, weights_only=True)
    expected = {**stored, "patch_embed.proj.weight": before["patch_embed.proj.weight"]}
    expected["blocks.1.mlp.fc2.bias"] = before["blocks.1.mlp.fc2.bias"]
    del expected["pos_embed"]
    assert_same_tensors(backbone.state_dict(), expected)


def test_the_line_names_what_was_left(path):
    backbone = toy_backbone(2, patch_size=16)
    before = tensors_of(backbone)
    report = load_backbone_weights(backbone, path, allow_partial=True)
    check(backbone, before, path)
    assert str(report) == (
        f"loaded 36/38 backbone tensors from official .pth {path}, statistics unknown, "
        "heads: none, missing: blocks.1.mlp.fc2.bias, unexpected: pos_embed, "
        "other shape: patch_embed.proj.weight; periods as stored"
    )
    assert (report.num_loaded, report.num_tensors) == (36, 38)


def test_by_default_nothing_is_loaded(path):
    backbone = toy_backbone(2, patch_size=16)
    before = tensors_of(backbone)
    with pytest.raises(ValueError, match=r"(?s)nothing was loaded.*patch_size 8 in the file but"):
        load_backbone_weights(backbone, path)
    assert_same_tensors(backbone.state_dict(), before)


def test_a_file_of_which_nothing_fits_is_an_error(tmp_path):
    other = {f"blocks.0.{name}": torch.zeros(5) for name in ("ls1.gamma", "ls2.gamma")}
    torch.save(other, tmp_path / "weights.pth")
    backbone = toy_backbone(2)
    before = tensors_of(backbone)
    with pytest.raises(ValueError, match="nothing was loaded"):
        load_backbone_weights(backbone, tmp_path / "weights.pth", allow_partial=True)
    assert_same_tensors(backbone.state_dict(), before)


def test_the_initializer_keeps_its_own_values_for_the_rest(path):
    init_cfg = {"type": "DINOv3Pretrained", "checkpoint": str(path), "allow_partial": True}
    config = {"type": "DINOv3ViT", "arch": TOY_ARCH, "patch_size": 16}
    torch.manual_seed(3)
    fresh = MODELS.build(config)
    fresh.init_weights()
    torch.manual_seed(3)
    backbone = MODELS.build({**config, "init_cfg": init_cfg})
    backbone.init_weights()
    check(backbone, tensors_of(fresh), path)


def test_build_backbone_initialises_the_rest(path):
    backbone = build_backbone(path, patch_size=16, allow_partial=True)
    stored = torch.load(path, weights_only=True)
    assert torch.equal(backbone.blocks[0].attn.qkv.weight, stored["blocks.0.attn.qkv.weight"])
    assert not backbone.blocks[1].mlp.fc2.bias.any()
    assert 0 < backbone.patch_embed.proj.weight.abs().max() <= (3 * 16 * 16) ** -0.5
