"""DINOv2 weights of every layout: recognised, rebuilt, converted back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinov3_mm.checkpoints import (
    build_backbone,
    export_backbone,
    load_backbone_weights,
    load_weights,
    read_statistics,
)
from dinov3_mm.checkpoints.formats.architecture import infer_dinov2_arch
from dinov3_mm.checkpoints.formats.hugging_face import dinov2_to_hf, hf_dinov2_config
from dinov3_mm.checkpoints.formats.timm import dinov2_to_timm
from dinov3_mm.models.backbones import DINOV2_ARCHITECTURES, DINOv2ViT, DINOv3ViT
from tests.checkpoints.toys import assert_same_tensors, redraw, tensors_of, toy_backbone
from tests.dinov2_toys import IMAGE_SIZES, REGISTERS, all_tokens, noise, toy_dinov2, toy_of_released
from tests.golden import assert_parity

NAMES = sorted(DINOV2_ARCHITECTURES)


def resampling(backbone):
    settings = backbone.arch_settings
    return settings["interpolate_offset"], settings["interpolate_antialias"]


@pytest.mark.parametrize("name", NAMES)
def test_every_released_architecture_is_inferred(name):
    with torch.device("meta"):
        state = DINOv2ViT(arch=name).state_dict()
    assert infer_dinov2_arch(state) == DINOV2_ARCHITECTURES[name]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_registers": 2, "in_channels": 1, "img_size": 28},
        {"qkv_bias": False, "proj_bias": False, "ffn_bias": False},
        {"ffn_layer": "swiglufused", "ffn_ratio": 3.3, "layer_scale_init_value": 0.0},
        {"ffn_ratio": 3.777777778, "norm_layer": "rmsnorm"},
    ],
)
def test_an_inferred_architecture_rebuilds_the_model(changes):
    state = toy_dinov2(**changes).state_dict()
    DINOv2ViT(arch={"num_heads": 2, **infer_dinov2_arch(state)}).load_state_dict(state)


@pytest.mark.parametrize("name", NAMES)
def test_official_files(name, tmp_path):
    source = toy_of_released(name)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    backbone = build_backbone(tmp_path / "weights.pth")
    assert backbone.arch_settings == source.arch_settings and not backbone.training
    assert_same_tensors(backbone.state_dict(), tensors_of(source))
    rule = "0 and antialias" if "reg" in name else "0.1 and no antialias"
    assert f"offset {rule}" in str(load_weights(tmp_path / "weights.pth").report)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_hugging_face_and_back(name, tmp_path):
    source = toy_of_released(name)
    tensors = dinov2_to_hf(source.state_dict())
    save_file(tensors, tmp_path / "model.safetensors")
    config = hf_dinov2_config(source.arch_settings, tensors, "float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = build_backbone(tmp_path)
    assert_same_tensors(backbone.state_dict(), tensors_of(source))
    assert resampling(backbone) == (0.0, "reg" in name)
    load_backbone_weights(source, tmp_path)
    assert_same_tensors(source.state_dict(), tensors_of(backbone))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_timm_and_back(name, tmp_path):
    source = toy_of_released(name)
    torch.save(dinov2_to_timm(source.state_dict()), tmp_path / "timm.pth")
    backbone = build_backbone(tmp_path / "timm.pth")
    assert resampling(backbone) == (0.0, True)
    assert (backbone.mask_token == 0).all()
    assert_parity(all_tokens(backbone, noise(16, 16)), all_tokens(source, noise(16, 16)))
    twin = DINOv2ViT(arch=source.arch_settings).eval()
    report = str(load_backbone_weights(twin, tmp_path / "timm.pth"))
    assert "mask token made up (0)" in report
    assert ("position of CLS made up" in report) == ("reg" in name)
    if "reg" not in name:
        assert "by the source, with offset 0.1 and no antialias by the backbone" in report
    for size in IMAGE_SIZES:
        assert_parity(all_tokens(twin, noise(*size)), all_tokens(source, noise(*size)))


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, REGISTERS, {"interpolate_antialias": True}])
def test_our_exports_keep_the_rule(arguments, tmp_path):
    source = toy_dinov2(**arguments)
    statistics = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    path = export_backbone(source, tmp_path / "model.safetensors", {"statistics": statistics})
    backbone = build_backbone(path)
    assert backbone.arch_settings == source.arch_settings
    assert torch.equal(all_tokens(backbone, noise(24, 12)), all_tokens(source, noise(24, 12)))
    assert read_statistics(path).name == "LVD-142M"


def hf_folder(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
def test_what_we_write_is_what_transformers_writes(gated, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = toy_dinov2(**REGISTERS, ffn_layer="swiglufused" if gated else "mlp")
    tensors = dinov2_to_hf(source.state_dict())
    config = hf_dinov2_config(source.arch_settings, tensors, "float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, loaded = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loaded.values())
    expected = model.eval()(noise(12, 40)).last_hidden_state
    assert_parity(all_tokens(source, noise(12, 40)), expected)
    assert_same_tensors(hf_folder(model, tmp_path / "again"), tensors)


def test_a_ratio_that_transformers_cannot_take_is_refused():
    source = toy_dinov2(ffn_ratio=2.5)
    with pytest.raises(ValueError, match="whole numbers as mlp_ratio"):
        hf_dinov2_config(source.arch_settings, {}, "float32")


def test_names_in_memory_and_inside_a_classifier_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        use_swiglu_ffn=True,
    )
    model = redraw(transformers.Dinov2ForImageClassification(config))
    model.save_pretrained(tmp_path / "disk")
    config.save_pretrained(tmp_path / "memory")
    save_file(model.state_dict(), tmp_path / "memory" / "model.safetensors")
    backbones = [build_backbone(tmp_path / name) for name in ("disk", "memory")]
    assert_same_tensors(backbones[0].state_dict(), tensors_of(backbones[1]))
    assert "ignored: classifier" in str(load_weights(tmp_path / "memory").report)


def test_timm_names_are_those_of_timm():
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 4, "img_size": 16}
    for name, expected in (
        ("small", timm.create_model("vit_small_patch14_dinov2", **sizes)),
        ("small_reg", timm.create_model("vit_small_patch14_reg4_dinov2", **sizes)),
        ("giant_reg", timm.create_model("vit_giant_patch14_reg4_dinov2", **sizes, mlp_ratio=5.5)),
    ):
        expected.load_state_dict(dinov2_to_timm(toy_of_released(name).state_dict()), strict=True)


def test_without_layer_scale_the_libraries_get_factors_of_1():
    state = toy_dinov2(layer_scale_init_value=0.0).state_dict()
    assert (dinov2_to_hf(state)["encoder.layer.1.layer_scale2.lambda1"] == 1).all()
    assert (dinov2_to_timm(state)["blocks.1.ls1.gamma"] == 1).all()


def test_rms_norm_is_refused():
    state = toy_dinov2(norm_layer="rmsnorm").state_dict()
    for convert in (dinov2_to_hf, dinov2_to_timm):
        with pytest.raises(ValueError, match="no RMSNorm"):
            convert(state)


def test_dinov3_files_are_still_dinov3(tmp_path):
    for changes in ({}, {"num_registers": 0}):
        torch.save(toy_backbone(**changes).state_dict(), tmp_path / "weights.pth")
        assert isinstance(build_backbone(tmp_path / "weights.pth"), DINOv3ViT)


def test_weights_of_the_other_family_are_refused(tmp_path):
    torch.save(toy_dinov2().state_dict(), tmp_path / "dinov2.pth")
    torch.save(toy_backbone().state_dict(), tmp_path / "dinov3.pth")
    with pytest.raises(ValueError, match="DINOv2ViT in the file but DINOv3ViT asked for"):
        load_backbone_weights(toy_backbone(), tmp_path / "dinov2.pth")
    with pytest.raises(ValueError, match="DINOv3ViT in the file but DINOv2ViT asked for"):
        load_backbone_weights(toy_dinov2(), tmp_path / "dinov3.pth")


def test_differences_of_architecture_are_named(tmp_path):
    torch.save(toy_dinov2(num_registers=3).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="img_size 16 in the file but 20 asked for"):
        load_backbone_weights(toy_dinov2(img_size=20), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="num_registers 3 in the file but 4 asked for"):
        load_backbone_weights(toy_dinov2(**REGISTERS), tmp_path / "weights.pth")


def test_what_cannot_be_told_is_an_error(tmp_path):
    source = toy_dinov2()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="lacks num_heads"):
        build_backbone(tmp_path / "weights.pth")
    load_backbone_weights(toy_dinov2(seed=1), tmp_path / "weights.pth")
    state = source.state_dict()
    with pytest.raises(ValueError, match="no img_size"):
        infer_dinov2_arch({**state, "pos_embed": torch.zeros(1, 12, 32)})
    save_file(dinov2_to_hf(state), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="cannot tell the channels per head"):
        build_backbone(tmp_path / "model.safetensors")


def test_an_epsilon_that_no_dinov2_has_is_refused(tmp_path):
    tensors = dinov2_to_hf(toy_dinov2().state_dict())
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"num_attention_heads": 2, "layer_norm_eps": 1e-3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layer_norm_eps is 0.001; DINOv2 has"):
        build_backbone(tmp_path)


def test_a_released_name_with_weights(tmp_path):
    torch.save(toy_dinov2().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="embed_dims 32 in the file but 384 asked for"):
        build_backbone("dinov2_vits14", tmp_path / "weights.pth")
    assert build_backbone("dinov2_vits14_reg", out_type="cls_token").num_registers == 4
