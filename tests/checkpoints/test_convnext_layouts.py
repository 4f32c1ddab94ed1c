"""ConvNeXt files: architectures read from tensors, the norm that is stored twice, refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinov3_mm.checkpoints import (
    build_backbone,
    export_backbone,
    load_backbone_weights,
    load_weights,
    read_metadata,
    to_hf,
    to_timm,
)
from dinov3_mm.checkpoints.formats.architecture import infer_convnext_arch
from dinov3_mm.models.backbones import CONVNEXT_ARCHITECTURES, ZOO, DINOv3ConvNeXt
from tests.checkpoints.toys import assert_same_tensors, redraw, tensors_of, toy_backbone

TOY = {"depths": [1, 1, 2, 1], "dims": [8, 12, 16, 24]}
CONVNEXTS = [name for name, row in ZOO.items() if row.backbone == "DINOv3ConvNeXt"]


def toy_convnext(seed: int = 0, **arguments) -> DINOv3ConvNeXt:
    backbone = DINOv3ConvNeXt(arch=TOY, **arguments)
    backbone.init_weights()
    return redraw(backbone, seed)


def test_every_released_convnext_is_recognised():
    for name in CONVNEXTS:
        with torch.device("meta"):
            state = DINOv3ConvNeXt(ZOO[name].arch).state_dict()
        assert infer_convnext_arch(state) == CONVNEXT_ARCHITECTURES[ZOO[name].arch]


@pytest.mark.parametrize("changes", [{}, {"in_channels": 1, "layer_scale_init_value": 0.0}])
def test_an_inferred_architecture_rebuilds_the_model(changes):
    original = toy_convnext(**changes)
    rebuilt = DINOv3ConvNeXt(arch=infer_convnext_arch(original.state_dict()))
    assert rebuilt.arch_settings == original.arch_settings
    rebuilt.load_state_dict(original.state_dict(), strict=True)


def test_a_file_says_what_it_is_and_how_it_differs(tmp_path):
    torch.save(toy_convnext(in_channels=2).state_dict(), tmp_path / "weights.pth")
    backbone = toy_convnext()
    before = tensors_of(backbone)
    with pytest.raises(ValueError, match=r"in_channels 2 in the file but 3 asked for"):
        load_backbone_weights(backbone, tmp_path / "weights.pth")
    other = DINOv3ConvNeXt(arch={**TOY, "depths": [1, 1, 3, 1]})
    with pytest.raises(ValueError, match=r"depths \[1, 1, 2, 1\] in the file but \[1, 1, 3, 1\]"):
        load_backbone_weights(other, tmp_path / "weights.pth")
    assert_same_tensors(backbone.state_dict(), before)
    with pytest.raises(ValueError, match=r"do not fit this DINOv3ViT"):
        load_backbone_weights(toy_backbone(), tmp_path / "weights.pth")
    torch.save(toy_backbone().state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"do not fit this DINOv3ConvNeXt"):
        load_backbone_weights(backbone, tmp_path / "vit.pth")


def test_an_incomplete_file_is_refused(tmp_path):
    state = toy_convnext().state_dict()
    del state["downsample_layers.2.1.weight"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="cannot be told: no dims"):
        build_backbone(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"missing \(1\): downsample_layers\.2\.1\.weight"):
        load_backbone_weights(toy_convnext(), tmp_path / "weights.pth")


@pytest.mark.parametrize("absent, copied", [("norm.", "norms.3."), ("norms.3.", "norm.")])
def test_one_of_the_two_norms_is_enough_and_the_report_says_so(absent, copied, tmp_path):
    source = toy_convnext()
    state = {k: v for k, v in source.state_dict().items() if not k.startswith(absent)}
    assert len(state) == len(source.state_dict()) - 2
    torch.save(state, tmp_path / "weights.pth")
    backbone = DINOv3ConvNeXt(arch=TOY)
    report = str(load_backbone_weights(backbone, tmp_path / "weights.pth"))
    assert f"{absent}weight made up (copy of {copied}weight)" in report
    assert_same_tensors(backbone.state_dict(), tensors_of(source))


def test_differing_norms_are_refused(tmp_path):
    state = tensors_of(toy_convnext())
    state["norms.3.bias"] += 1
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"norm\.bias and norms\.3\.bias differ"):
        load_weights(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"norm\.bias and norms\.3\.bias differ"):
        to_hf(state)


def test_written_files_hold_both_norms(tmp_path):
    source = toy_convnext(patch_size=16)
    path = export_backbone(source, tmp_path / "weights.safetensors")
    assert_same_tensors(load_file(path), tensors_of(source))
    stated = read_metadata(path)
    assert stated["backbone"] == "DINOv3ConvNeXt" and stated["arch"] == source.arch_settings
    assert (stated["patch_size"], stated["num_registers"]) == (16, 0)
    rebuilt = build_backbone(path, out_indices=(0, 1, 2, 3))
    assert rebuilt.arch_settings == source.arch_settings
    assert_same_tensors(rebuilt.state_dict(), tensors_of(source))


def test_training_exports_prefer_the_ema_weights(tmp_path):
    teacher, student = toy_convnext(1), toy_convnext(2)
    model = {f"teacher.backbone.{k}": v for k, v in teacher.state_dict().items()}
    model |= {f"student.backbone.{k}": v for k, v in student.state_dict().items()}
    torch.save({"model": model}, tmp_path / "weights.pth")
    checkpoint = load_weights(tmp_path / "weights.pth")
    assert_same_tensors(checkpoint.state_dict, tensors_of(teacher))
    assert "ignored: student" in str(checkpoint.report)


def test_names_of_the_zoo_build_a_convnext(monkeypatch, tmp_path):
    monkeypatch.setitem(CONVNEXT_ARCHITECTURES, "base", toy_convnext().arch_settings)
    source = toy_convnext(3)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    for name in ("dinov3_convnext_base", "dinov3_convnext_base_lvd1689m"):
        backbone = build_backbone(name, tmp_path / "weights.pth", patch_size=16)
        assert backbone.patch_size == 16 and not backbone.training
        assert_same_tensors(backbone.state_dict(), tensors_of(source))
    with pytest.raises(ValueError, match="no qkv bias mask"):
        build_backbone("dinov3_convnext_base", tmp_path / "weights.pth", reset_bias_mask=True)


def test_a_configuration_of_another_convnext_is_refused(tmp_path):
    save_file(to_hf(toy_convnext().state_dict()), tmp_path / "model.safetensors")
    for key, value in (("layer_norm_eps", 1e-5), ("hidden_act", "gelu_new")):
        (tmp_path / "config.json").write_text(json.dumps({key: value}))
        with pytest.raises(ValueError, match=f"{key} is {value}; DINOv3's ConvNeXt has"):
            load_weights(tmp_path)


def test_only_official_names_are_converted():
    state = toy_convnext().state_dict()
    with pytest.raises(ValueError, match="Hugging Face ConvNeXt names"):
        to_timm(to_hf(state))
    with pytest.raises(ValueError, match=r"names under 'backbone\.'"):
        to_hf({f"backbone.{name}": tensor for name, tensor in state.items()})
    with pytest.raises(TypeError, match="qkv_bias"):
        to_timm(state, qkv_bias=False)
