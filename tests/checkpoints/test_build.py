"""Backbones by name, by file, and by initializer."""

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS

from dinov3_mm.checkpoints import build_backbone, list_backbones
from dinov3_mm.models.backbones import VIT_ARCHITECTURES, ZOO, DINOv3ViT
from tests.checkpoints.toys import TOY_ARCH, assert_same_tensors, tensors_of, toy_backbone


@pytest.fixture
def toy_zoo(monkeypatch):
    """The released ViT-L rows at toy size, so that names can be built in no time."""
    full = toy_backbone(patch_size=16).arch_settings
    satellite = {**full, "untie_global_and_local_cls_norm": True}
    monkeypatch.setitem(VIT_ARCHITECTURES, "large", full)
    monkeypatch.setitem(VIT_ARCHITECTURES, "large_sat", satellite)
    return {"lvd": full, "sat": satellite}


def test_names_are_listed_by_pattern():
    assert list_backbones() == sorted(ZOO)
    assert list_backbones("*sat493m") == ["dinov3_vit7b16_sat493m", "dinov3_vitl16_sat493m"]
    assert list_backbones("resnet*") == []


def test_a_name_alone_is_initialised_and_in_eval_mode(toy_zoo):
    torch.manual_seed(3)
    first = build_backbone("dinov3_vitl16_lvd1689m", out_indices=(0, 1))
    torch.manual_seed(3)
    second = build_backbone("dinov3_vitl16")
    assert not first.training and first.arch_settings == toy_zoo["lvd"]
    assert_same_tensors(first.state_dict(), tensors_of(second))
    assert build_backbone("dinov3_vitl16_sat493m").local_cls_norm is not None


def test_a_name_with_weights(toy_zoo, tmp_path):
    source = toy_backbone(1, patch_size=16)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    backbone = build_backbone("dinov3_vitl16_lvd1689m", tmp_path / "weights.pth")
    assert not backbone.training
    assert_same_tensors(backbone.state_dict(), tensors_of(source))


def test_an_official_name_takes_satellite_weights_completely(toy_zoo, tmp_path):
    source = toy_backbone(1, patch_size=16, untie_global_and_local_cls_norm=True)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    backbone = build_backbone("dinov3_vitl16", weights=tmp_path / "weights.pth")
    assert_same_tensors(backbone.state_dict(), tensors_of(source))


def test_the_weights_of_another_architecture_are_refused(toy_zoo, tmp_path):
    torch.save(toy_backbone(num_registers=3).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"num_registers 3 in the file but 2 asked for"):
        build_backbone("dinov3_vitl16", tmp_path / "weights.pth")


def test_overrides_reach_the_backbone(tmp_path):
    torch.save(toy_backbone(1).state_dict(), tmp_path / "weights.pth")
    backbone = build_backbone(tmp_path / "weights.pth", out_type="cls_token", drop_path_rate=0.2)
    assert backbone.drop_path_rate == 0.2
    assert backbone(torch.zeros(1, 3, 16, 16))[0].shape == (1, 32)
    with pytest.raises(TypeError, match=r"no argument 'out_indicies'; did you mean 'out_indices'"):
        build_backbone(tmp_path / "weights.pth", out_indicies=(0,))


def test_unknown_names_and_missing_files_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match=r"did you mean 'dinov3_vitb16_lvd1689m'"):
        build_backbone("dinov3_vitb16_lvd1698m")
    with pytest.raises(FileNotFoundError, match=r"nor a local file"):
        build_backbone(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match=r"no weights at .*absent\.pth"):
        build_backbone("dinov3_vits16", weights=tmp_path / "absent.pth")
    torch.save(toy_backbone(1).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="a weight file already"):
        build_backbone(tmp_path / "weights.pth", weights=tmp_path / "other.pth")


def test_an_architecture_beside_a_file_or_a_name_is_refused(tmp_path):
    torch.save(toy_backbone(1).state_dict(), tmp_path / "weights.pth")
    match = r"weights\.pth is read from the file itself: leave arch='small' out\. To load it into"
    with pytest.raises(TypeError, match=match):
        build_backbone(tmp_path / "weights.pth", arch="small")
    match = r"dinov3_vits16 is a name, which stands for an architecture \(DINOv3ViT, 'small'\)"
    with pytest.raises(TypeError, match=match):
        build_backbone("dinov3_vits16", arch=TOY_ARCH)


def initialised(checkpoint, **options):
    init_cfg = {"type": "DINOv3Pretrained", "checkpoint": str(checkpoint), **options}
    backbone = MODELS.build(
        {"type": "DINOv3ViT", "arch": TOY_ARCH, "patch_size": 8, "init_cfg": init_cfg}
    )
    backbone.init_weights()
    return backbone


def test_the_initializer_loads_through_init_cfg(tmp_path):
    source = toy_backbone(1)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    assert_same_tensors(initialised(tmp_path / "weights.pth").state_dict(), tensors_of(source))


def test_the_initializer_passes_its_options_on(tmp_path):
    state = tensors_of(toy_backbone(1))
    for name, tensor in state.items():
        if name.endswith("bias_mask"):
            tensor.zero_()
    exact = state["rope_embed.periods"]
    state["rope_embed.periods"] = exact.bfloat16()
    torch.save(state, tmp_path / "weights.pth")
    backbone = initialised(tmp_path / "weights.pth", reset_bias_mask=True, periods="exact")
    thirds = backbone.blocks[0].attn.qkv.bias_mask.view(3, -1).mean(1)
    assert thirds.tolist() == [1, 0, 1]
    assert torch.equal(backbone.rope_embed.periods, exact)


def test_the_initializer_works_inside_a_larger_model(tmp_path):
    source = toy_backbone(1)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    init_cfg = {"type": "DINOv3Pretrained", "checkpoint": str(tmp_path / "weights.pth")}

    class Segmentor(BaseModule):
        def __init__(self):
            super().__init__()
            self.backbone = DINOv3ViT(TOY_ARCH, patch_size=8, init_cfg=init_cfg)
            self.head = torch.nn.Linear(32, 2)

    segmentor = Segmentor()
    segmentor.init_weights()
    assert_same_tensors(segmentor.backbone.state_dict(), tensors_of(source))


def test_the_initializer_refuses_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*absent\.pth"):
        initialised(tmp_path / "absent.pth")
