"""Every architecture of the table, at toy width, through every layout and back."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dinov3_mm.checkpoints import load_backbone_weights, load_weights, to_hf, to_timm
from dinov3_mm.models.backbones import VIT_ARCHITECTURES, DINOv3ViT
from tests.checkpoints.toys import assert_same_tensors, redraw, tensors_of

WIDTH = {"embed_dims": 64, "num_layers": 2}


def toy_of(name):
    """The architecture at width 64, with as many channels per head as a quarter of the real one."""
    real = VIT_ARCHITECTURES[name]
    heads = 4 * 64 * real["num_heads"] // real["embed_dims"]
    backbone = DINOv3ViT(arch={**real, **WIDTH, "num_heads": heads})
    backbone.init_weights()
    return redraw(backbone)


def assert_restored(source, path, lost):
    """Load ``path`` into a fresh twin and compare all but the tensors that the format loses."""
    expected = tensors_of(source)
    twin = DINOv3ViT(arch=source.arch_settings)
    load_backbone_weights(twin, path, periods="exact")
    state = twin.state_dict()
    for name in [name for name in expected if name.startswith(lost)]:
        made_up = {"mask_token": torch.zeros(1, 64)}
        if name.startswith("local_cls_norm"):
            made_up[name] = expected[name.removeprefix("local_cls_")]
        expected[name] = made_up[name]
    for name in expected:
        if name.endswith("qkv.bias"):
            expected[name] = expected[name] * expected[f"{name}_mask"]
    assert_same_tensors(state, expected)


@pytest.mark.parametrize("name", sorted(VIT_ARCHITECTURES))
def test_official(name, tmp_path):
    source = toy_of(name)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    checkpoint = load_weights(tmp_path / "weights.pth")
    assert_same_tensors(checkpoint.state_dict, tensors_of(source))
    rebuilt = DINOv3ViT(arch=checkpoint.arch)
    rebuilt.load_state_dict(checkpoint.state_dict, strict=True)


@pytest.mark.parametrize("name", sorted(VIT_ARCHITECTURES))
def test_hugging_face(name, tmp_path):
    source = toy_of(name)
    save_file(to_hf(source.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": source.num_heads}))
    assert_restored(source, tmp_path, lost=("local_cls_norm",))


@pytest.mark.parametrize("name", sorted(VIT_ARCHITECTURES))
def test_timm(name, tmp_path):
    source = toy_of(name)
    save_file(to_timm(source.state_dict()), tmp_path / "timm.safetensors")
    assert_restored(source, tmp_path / "timm.safetensors", lost=("local_cls_norm", "mask_token"))
